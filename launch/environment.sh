#!/usr/bin/env bash
# Makes .venv in the checkout, with the versions of constraints.txt, unless it is up to date.
# --dev adds the tools of the tests. It is safe to run it again at any time: while another one runs,
# and after one that was killed.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/common.sh"

case ${1:-} in
"") wants=vico ;;
--dev) wants='vico[dev]' ;;
-h | --help)
    echo "usage: bash launch/environment.sh [--dev]"
    echo "makes or renews $venv, from PYTHON or else the first python3 that is 3.10 or newer"
    exit 0
    ;;
*) fail "unknown flag $1; usage: bash launch/environment.sh [--dev]" ;;
esac

# The stamp tells what an environment was made from. It is written last, so an environment with a
# stamp is complete. It depends on the path, because a virtual environment breaks when it is moved.
stamp=$({ echo "$root" && cat "$root/setup.py" "$root/launch/constraints.txt"; } | cksum)
has_stamp() { grep -qxF "$stamp $1" "$venv/stamp" 2>/dev/null; }
is_made() { [[ -x $venv/bin/python ]] && { has_stamp 'vico[dev]' || has_stamp "$wants"; }; }
is_made && exit 0

exec 9>"$root/.venv.lock"
if command -v flock >/dev/null && ! flock -n 9; then
    say "another process is making $venv; waiting for it"
    flock 9
    is_made && exit 0
fi

# The Python to build on.
base=
# From here on the current folder is the checkout: `python -m` and `python -c` import from it, and
# the user's may hold anything. It also spares pip a path with blanks for '-e .[dev]' below.
[[ ${PYTHON:-} != */* || $PYTHON == /* ]] || PYTHON=$PWD/$PYTHON
cd "$root"
candidates=(python3 python3.13 python3.12 python3.11 python3.10)
[[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
for name in "${candidates[@]}"; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        base=$name
        break
    fi
done
remedy="install Python 3.10 or newer, or set PYTHON to one"
[[ $base ]] || fail "${PYTHON:-python3} is missing or older than 3.10; $remedy"
remedy="install its venv module (Debian, Ubuntu: apt-get install python3-venv)"
"$base" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$base cannot make virtual environments; $remedy"

# Start from scratch where this script was killed (its mark is still there), where the folder was
# moved, or where its Python does not run.
begun=$venv/being-made
is_usable() { grep -qsF "$venv" "$venv/bin/activate" && "$venv/bin/python" -c '' 2>/dev/null; }
if [[ -e $begun ]] || ! is_usable; then
    say "making $venv"
    rm -rf "$venv"
    mkdir "$venv"
    touch "$begun"
    "$base" -m venv "$venv"
fi
touch "$begun"
rm -f "$venv/stamp"

quiet=-qq
[[ -t 2 ]] && quiet= # on a terminal, show pip's progress
pip() { "$venv/bin/python" -m pip $quiet --disable-pip-version-check "$@" >&2; }
pip_failed() {
    rm "$begun" # pip undid its changes, so the environment is as it was before
    fail "pip could not install $1; its message is above"
}

# torch first and alone: its right build depends on the machine, and deepspeed's setup imports it.
# PyPI's torch for Linux brings gigabytes of CUDA. Without a GPU take the CPU build: from a folder
# that pip searches (PIP_FIND_LINKS), else from PyTorch's index: torch alone, as of two indexes the
# one with the higher version of a package would win.
torch=$(grep '^torch==' launch/constraints.txt)
say "installing $torch"
has_torch() {
    local version=${torch#torch==}
    "$venv/bin/python" -c "import torch; assert torch.__version__.split('+')[0] == '$version'"
} 2>/dev/null
pytorch_index=https://download.pytorch.org/whl/cpu
if [[ $(uname -s) == Linux ]] && ! has_gpu && ! has_torch; then
    pip install --no-index --no-deps "$torch+cpu" 2>/dev/null ||
        pip --timeout 10 --retries 1 install --no-deps --index-url "$pytorch_index" "$torch+cpu" ||
        say "no CPU build is available; taking PyPI's, a download of gigabytes"
fi
pip install -c launch/constraints.txt "$torch" setuptools || pip_failed torch

say "installing the other packages"
# Without isolation deepspeed is built with the pinned setuptools and the installed torch.
pip install -c launch/constraints.txt --use-pep517 --no-build-isolation -e ".${wants#vico}" ||
    pip_failed "ViCo's dependencies"

torch_sees_gpu() {
    "$venv/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'
}
if has_gpu && ! torch_sees_gpu; then
    say "warning: torch cannot use this machine's GPU, so runs will use the CPU;" \
        "the driver may be too old for $torch"
fi
rm "$begun"
echo "$stamp $wants" >"$venv/stamp"
say "$venv is ready"
