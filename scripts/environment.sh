# Sourced by the other scripts: makes .venv with the tested set, and puts it first on PATH.
# Usage: ensure_environment EXTRA...   (extras of pyproject.toml; none for plain use)

ensure_environment() {
    local python=${PYTHON:-python3} extras wanted
    extras=$(IFS=,; echo "$*")
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "Python 3.11 or newer is needed, and \`$python\` is not. Set PYTHON=/path/to/python3.11" >&2
        exit 1
    fi
    if [ ! -x .venv/bin/python ]; then
        echo "making .venv"
        "$python" -m venv .venv || {
            echo "the venv module is missing; on Debian and Ubuntu: apt-get install python3-venv" >&2
            exit 1
        }
    fi
    # What was installed is remembered by the files it depends on, so that a second start is quick.
    wanted="$(cat pyproject.toml constraints.txt | sha256sum | cut -d' ' -f1) [$extras]"
    touch .venv/installed
    if ! grep -qxF "$wanted" .venv/installed; then
        echo "installing the tested set into .venv (about 1.5 GB the first time)"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${extras:+[$extras]}" || exit 1
        echo "$wanted" >> .venv/installed
    fi
    export PATH="$PWD/.venv/bin:$PATH"
}
