#!/usr/bin/env bash
# Makes .venv in the checkout with the versions of constraints.txt, or finds it made. --dev adds the tools of the tests.
# Can be started again at any time, also while another start is at it, and after one that was killed.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/common.sh"

case ${1:-} in
"") wants=vico ;;
--dev) wants='vico[dev]' ;;
-h | --help)
    echo "usage: bash launch/environment.sh [--dev]    makes or renews $venv (of PYTHON, or the first python3 from 3.10 on)"
    exit 0
    ;;
*) fail "unknown flag $1; usage: bash launch/environment.sh [--dev]" ;;
esac

# Says what an environment was made of. Written last, so an environment that has it is whole; the path is in it because
# a virtual environment that was moved is broken.
stamp=$({ echo "$root" && cat "$root/setup.py" "$root/launch/constraints.txt"; } | cksum)
is_made() {
    [[ -x $venv/bin/python ]] && { grep -qxF "$stamp vico[dev]" "$venv/stamp" || grep -qxF "$stamp $wants" "$venv/stamp"; } 2>/dev/null
}
is_made && exit 0

exec 9>"$root/.venv.lock"
if command -v flock >/dev/null && ! flock -n 9; then
    say "another start makes $venv; waiting for it"
    flock 9
    is_made && exit 0
fi

# The Python to build on: only one that can make virtual environments will do.
base=
for name in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        base=$name
        break
    fi
done
[[ $base ]] || fail "${PYTHON:-python3} is missing or older than 3.10; install Python 3.10 or newer, or set PYTHON to one"
"$base" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$base cannot make virtual environments; install its venv module (Debian, Ubuntu: apt-get install python3-venv)"

# Begin anew where a start was killed (its mark is still there), where the folder was moved, or where Python is gone.
begun=$venv/being-made
if [[ -e $begun ]] || ! grep -qsF "$venv" "$venv/bin/activate" || ! "$venv/bin/python" -c '' 2>/dev/null; then
    say "making $venv"
    rm -rf "$venv"
    mkdir "$venv"
    touch "$begun"
    "$base" -m venv "$venv"
fi
touch "$begun"
rm -f "$venv/stamp"

cd "$root" # '-e .[dev]' below: pip would split a longer path at its blanks
quiet=-qq
[[ -t 2 ]] && quiet= # a person likes to see a download move
pip() { "$venv/bin/python" -m pip $quiet --disable-pip-version-check "$@" >&2; }
pip_failed() {
    rm "$begun" # it ended by itself and took back what it began: what is there stays good
    fail "pip could not install $1; its message is above"
}

# torch first and alone: which build is right depends on the machine, and deepspeed's setup looks at it. For Linux PyPI's torch
# brings gigabytes of CUDA: without a GPU take the CPU build, from a folder that pip is told to look in (PIP_FIND_LINKS), or from
# where PyTorch keeps it.
torch=$(grep '^torch==' launch/constraints.txt)
say "installing $torch"
has_torch() { "$venv/bin/python" -c "import torch; assert torch.__version__.split('+')[0] == '${torch#torch==}'" 2>/dev/null; }
if [[ $(uname -s) == Linux ]] && ! has_gpu && ! has_torch; then
    pip install --no-index --no-deps "$torch+cpu" 2>/dev/null ||
        pip --timeout 10 --retries 1 install -c launch/constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu "$torch+cpu" ||
        say "there is no CPU build to be had; taking PyPI's, a download of gigabytes"
fi
pip install -c launch/constraints.txt "$torch" setuptools || pip_failed torch

say "installing the other packages"
# Without isolation deepspeed is built by the pinned setuptools, next to the torch that is there, and downloads nothing more.
pip install -c launch/constraints.txt --use-pep517 --no-build-isolation -e ".${wants#vico}" || pip_failed "ViCo's dependencies"

if has_gpu && ! "$venv/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    say "warning: torch cannot use this machine's GPU, and runs will be on the CPU; the driver may be too old for $torch"
fi
rm "$begun"
echo "$stamp $wants" >"$venv/stamp"
say "$venv is ready"
