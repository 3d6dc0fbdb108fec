"""Copy the README's picture out of the executed chapter: `python -m tools.readme_figure`, after `make book`."""

import base64

import nbformat

from tools.project import here

FIGURE, TARGET = "fig-gradient-terms", "book/_static/gradient-terms.png"


def main() -> None:
    """Write the picture, or say that the book has to be built first."""
    project = here()
    for path in map(project.executed, project.notebooks()):
        cells = nbformat.read(path, as_version=4).cells if path.exists() else []
        for output in (output for cell in cells for output in cell.get("outputs", [])):
            if output.get("metadata", {}).get("scanrnn", {}).get("name") == FIGURE:
                (project.root / TARGET).write_bytes(base64.b64decode(output.data["image/png"]))
                print(f"{TARGET} is the picture in {path.name}")
                return
    raise SystemExit(f"{FIGURE} stands in no executed notebook: run `make book` first")


if __name__ == "__main__":
    main()
