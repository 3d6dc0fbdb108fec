#!/bin/sh
# Make or update the virtual environment $1. The file .complete in it says that the last installation reached its end;
# an environment without it is made anew.
set -eu
venv=$1

if [ ! -e "$venv/.complete" ]; then
    if [ -e "$venv" ]; then
        echo "$venv is not complete (an interrupted installation?): making it anew"
        rm -rf "$venv"
    fi
    python=
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
    if [ -z "$python" ]; then
        echo "Python 3.11 or newer is needed, and no python3 on the PATH is. Install it (python.org, or your system's" >&2
        echo "package manager), then run make again." >&2
        exit 1
    fi
    echo "Making $venv with $("$python" --version)"
    if ! "$python" -m venv "$venv"; then
        rm -rf "$venv"
        echo "$python cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv, then run make again." >&2
        exit 1
    fi
fi

rm -f "$venv/.complete"
echo "Installing the book's packages into $venv (a few minutes the first time) ..."
if ! "$venv/bin/python" -m pip install --quiet -c constraints.txt -e ".[book,test]"; then
    echo "pip could not install the packages (it says why above). With the network back, run make again." >&2
    exit 1
fi
touch "$venv/.complete"
