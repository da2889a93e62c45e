"""`pip install .`: the installed package works without its checkout."""

import shutil
import sys
from pathlib import Path

from support.processes import ROOT, clean_environment, run_command

PIP = "-m pip install --quiet --no-deps --no-build-isolation --no-index --target".split()
SCRIPTS = {"browse.js", "charts.js"}
OUTSIDE = ["-S", "-m", "vico"]  # -S: without the other packages of this Python


def test_installed_package_has_its_files(tmp_path: Path) -> None:
    """Its ds_configs and the report's page, byte by byte; `vico plan` needs no other package."""
    checkout, site = tmp_path / "checkout", tmp_path / "site"
    checkout.mkdir()
    for name in ("vico", "ds_configs"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.py", checkout)
    pip = run_command([sys.executable, *PIP, str(site), str(checkout)], tmp_path)
    assert pip.codes == [0], pip.output
    shutil.rmtree(checkout)
    shipped = {p.name: p.read_bytes() for p in (ROOT / "ds_configs").iterdir()}
    installed = (site / "vico" / "ds_configs").iterdir()
    assert {p.name: p.read_bytes() for p in installed} == shipped
    for page in (ROOT / "vico" / "report").glob("page.*"):
        assert (site / "vico" / "report" / page.name).read_bytes() == page.read_bytes()
    assert {path.name for path in (site / "vico" / "report").glob("*.js")} == SCRIPTS
    environment = {**clean_environment(), "PYTHONPATH": str(site)}
    for words in (["plan", "--table"], ["plan", "--model", "13B", "--gpus", "8", "--gpu", "H100"]):
        command = [sys.executable, *OUTSIDE, *words]
        run = run_command(command, tmp_path, environment)
        assert run.codes == [0], run.output
        in_checkout = run_command(command, ROOT, {**environment, "PYTHONPATH": str(ROOT)})
        assert run.stdouts == in_checkout.stdouts
