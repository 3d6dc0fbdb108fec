"""`make book`: execute, generate, lay out. Does only what is not up to date."""

import sys

from tools import execute, generate, site
from tools.project import here, one_build_at_a_time


def main() -> int:
    """Build the book; 0 if the site is complete and current."""
    project = here()
    try:
        with one_build_at_a_time(project):
            execute.run(project)
            generate.run(project)
            site.run(project)
    except (execute.ExecutionFailed, generate.RecordsIncomplete, site.SiteFailed, ValueError) as error:
        print(f"\nThe book was not built.\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; the next `make book` goes on from the last finished notebook.", file=sys.stderr)
        return 130
    print(f"\nThe book is ready. Open it in a browser:\n\n  {(project.html / 'index.html').as_uri()}")
    print("\nor type `make serve` and open http://127.0.0.1:8000/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
