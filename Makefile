# The book and everything that runs it. Plain recipes, GNU make 3.81 or newer.
#
#   make book         the book: executed, checked, laid out in _build/html
#   make test         all tests: library, notebooks, built site
#   make serve        the book on http://127.0.0.1:8000
#   make nightly      the tests that take long
#   make bench        benchmarks
#   make paper        the sweeps at the paper's scale, hours in all; FIGURE=zo24-fig3a TEACHER=authors for one
#   make lint         ruff and pyright
#   make browser      install the Chromium that the site's tests need (Debian, Ubuntu; as root)
#   make constraints  resolve constraints.txt after a change in pyproject.toml (UPGRADE=--upgrade: newest of all)
#   make address ADDRESS=https://github.com/owner/name     tell the whole project where it lives
#   make clean        remove what was built; `make distclean` removes the virtual environment too

PY = .venv/bin/python
PORT = 8000
READY = .venv/.complete

# OpenBLAS's thread pool fights XLA's, and the book's own kernels must not tread on the outer build's settings.
export OPENBLAS_NUM_THREADS = 1
unexport SCANRNN_RECORDS

.PHONY: book test serve nightly bench paper lint browser constraints address clean distclean

book: $(READY)
	@$(PY) -m tools.build

test: book
	@echo; echo "=== Library ==="
	$(PY) -m pytest tests/lib tests/book -m "not slow" -n 2 -q
	@echo; echo "=== Notebooks, every cell ==="
	@rm -rf _build/nbval
	SCANRNN_RECORDS="$(CURDIR)/_build/nbval" $(PY) -m pytest --nbval-lax --nbval-cell-timeout=600 \
	    -n 2 --dist loadscope -q -W default book/*.ipynb
	@echo; echo "=== Site ==="
	$(PY) -m pytest tests/site -m "not slow" -n 2 -q

serve: book
	@echo "http://127.0.0.1:$(PORT)/  (Ctrl-C stops)"
	@$(PY) -m http.server $(PORT) --bind 127.0.0.1 --directory _build/html

nightly: book
	$(PY) -m pytest tests/lib tests/book tests/site -m slow -n 2 --dist loadscope

paper: $(READY)
	$(PY) -m tools.paper $(FIGURE) $(TEACHER)

bench: $(READY)
	$(PY) -m pytest tests/benchmarks --benchmark-only -s

lint: $(READY)
	@$(PY) -c "import ruff, pyright" 2>/dev/null || $(PY) -m pip install --quiet -c constraints.txt -e ".[dev]"
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m pyright

browser:
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
	    { apt-get update && apt-get install --yes chromium; }

constraints: $(READY)
	@$(PY) -c "import uv" 2>/dev/null || $(PY) -m pip install --quiet uv
	$(PY) -m uv pip compile --universal pyproject.toml --all-extras --output-file constraints.txt \
	    --no-emit-index-url --custom-compile-command "make constraints" $(UPGRADE)

address: $(READY)
	@$(PY) -m tools.address $(ADDRESS)

clean:
	rm -rf _build

distclean: clean
	rm -rf .venv

# The virtual environment, complete or not at all.
$(READY): pyproject.toml constraints.txt
	@sh tools/make_venv.sh .venv
