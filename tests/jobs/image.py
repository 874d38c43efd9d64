"""Builds the real Dockerfile without an engine: Debian's buildah, on a base image made by debootstrap.

The base stands in for the Python image that the Dockerfile names, which only a registry has: the same Debian and the
same minor version of Python, `python` in /usr/local/bin.
"""

from __future__ import annotations

import json
import os
import shutil
import ssl
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.ground import ROOT, kept

RELEASE = "bookworm"
BASE, NAME = "localhost/base", "localhost/hf_finetune:cpu"
TOKEN = "pip-secret-that-no-layer-holds"


@dataclass(frozen=True)
class Image:
    """A built image, its file system mounted."""

    root: Path
    config: dict[str, Any]
    """What `docker inspect` calls Config."""
    history: str
    log: str
    """Of the build."""


class Builder:
    """buildah with a storage of its own."""

    def __init__(self) -> None:
        self.folder = kept("image")
        self._storage = ["--root", str(self.folder / "storage"), "--runroot", str(self.folder / "run")]

    def __call__(self, *words: str) -> str:
        """Run buildah; its stdout."""
        command = ["buildah", *self._storage, "--storage-driver", "overlay", *words]
        done = subprocess.run(command, check=False, text=True, capture_output=True, timeout=900)
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return done.stdout + (done.stderr if words[0] == "build" else "")

    def image(self) -> Image:
        """Build the base where it is missing, then the Dockerfile."""
        if BASE not in self("images", "--format", "{{.Name}}"):
            self._base()
        log = self._build()
        root = Path(self("mount", self("from", NAME).strip()).strip())
        described = json.loads(self("inspect", "--type", "image", NAME))["Docker"]
        return Image(root, described["config"], json.dumps(described["history"]), log)

    def close(self) -> None:
        """Unmount what was mounted. Images stay, and layers, for the next build; `make clean` removes them."""
        self("rm", "--all")

    def _base(self) -> None:
        root = self.folder / "base"
        shutil.rmtree(root, ignore_errors=True)
        command = ["debootstrap", "--variant=minbase", "--include=ca-certificates,python3,python3-venv"]
        subprocess.run([*command, RELEASE, str(root), *_mirror()], check=True, stdout=subprocess.DEVNULL, timeout=600)
        for name in ("python", "python3"):
            (root / "usr/local/bin" / name).symlink_to("/usr/bin/python3")
        for rubbish in [*root.glob("var/lib/apt/lists/*"), *root.glob("var/cache/apt/archives/*.deb")]:
            shutil.rmtree(rubbish) if rubbish.is_dir() else rubbish.unlink()
        container = self("from", "scratch").strip()
        self("copy", "-q", container, str(root), "/")
        self("commit", "-q", "--rm", container, BASE)
        shutil.rmtree(root)

    def _build(self) -> str:
        """The Dockerfile as anybody builds it, with the pip settings of this machine as its secret."""
        settings, files = _pip_settings()
        secret = self.folder / "pip.conf"
        secret.write_text(settings)
        mounts = [word for file in files for word in ("--volume", f"{file}:{file}:ro")]
        given = {"BASE": BASE, "VARIANT": "cpu", "REVISION": "0123abc", "CREATED": "2026-01-02T03:04:05Z"}
        if any("torch-" in name.name for file in files for name in Path(file).glob("*.whl")):
            given["TORCH_INDEX"] = ""  # it lies on this machine
        arguments = [word for name, value in given.items() for word in ("--build-arg", f"{name}={value}")]
        # Layers make the next build quick, and the first one slow.
        layers = f"--layers={str('CI' not in os.environ).lower()}"
        how = ["--isolation", "chroot", "--format", "docker", layers, "--secret", f"id=pip,src={secret}"]
        return self("build", *how, *mounts, *arguments, "-t", NAME, str(ROOT))


def _mirror() -> list[str]:
    """Where this machine has its Debian packages from; debootstrap's own choice where that can't be told."""
    words = [word for file in Path("/etc/apt").rglob("*.sources") for word in file.read_text().split()]
    words += [word for file in Path("/etc/apt").rglob("*.list") for word in file.read_text().split()]
    return [word for word in words if word.rstrip("/").endswith("/debian")][:1]


def _pip_settings() -> tuple[str, list[str]]:
    """A pip.conf with the settings of this machine, and the files and folders that they lead to."""
    lines = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, text=True, capture_output=True
    ).stdout.splitlines()
    found = {}
    for line in lines:
        name, _, value = line.partition("=")
        key = name.rpartition(".")[2]
        if key in ("index-url", "extra-index-url", "find-links", "cert", "trusted-host"):
            found[key] = value.strip("'\"").replace("\\n", " ")
    paths = [word.removeprefix("file://") for value in found.values() for word in value.split()]
    trusted = ssl.get_default_verify_paths().openssl_cafile
    files = [path.removesuffix("/simple") for path in [*paths, trusted] if path.startswith("/") and Path(path).exists()]
    settings = "".join(f"{key} = {value}\n" for key, value in found.items())
    return f"[global]\n# {TOKEN}\n{settings}", sorted(set(files))
