"""All files that studies need, fetched before they start: ``python -m tuneformer.data.download <study>``.

In: names of studies. Out: the files below ``paths.DOWNLOADS``; or one sentence, and one command per missing file.
"""

import argparse
import sys

from tuneformer.artifacts import UserError
from tuneformer.data import fetch, sources
from tuneformer.study import batch, jobs


def main(arguments: list[str] | None = None) -> int:
    """Fetch what studies need: checkpoint, cells, list of genes; if that fails, say how to fetch all by hand."""
    parser = argparse.ArgumentParser(prog="python -m tuneformer.data.download", description=main.__doc__)
    parser.add_argument("study", nargs="+", help="name of a file in params/, without .yaml; or default, or all")
    files: dict[fetch.RemoteFile, None] = {}
    try:
        names = [study for name in parser.parse_args(arguments).study for study in batch(name)]
        for settings in (job for study in names for job in jobs(study)):
            sources.source_path(settings)
            files |= dict.fromkeys(sources.remote_files(settings))
        for file in files:
            fetch.fetch(file)
    except UserError as error:
        missing = [file.curl for file in files if not fetch.is_present(file)]
        print(error, *(["All that is missing, by hand:", *missing] if missing else []), sep="\n", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
