"""Runs the code blocks of a page of documentation, and compares what they print with comments."""

import os
import re
import subprocess
import sys
from pathlib import Path

from processes import CPU

SHELLS = {"bash": ("bash", "-e"), "python": ("bash", "-c", "exec python -")}


def blocks(text: str, *languages: str) -> list[tuple[str, str]]:
    """The language and the text of a page's code blocks, in order."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(language, block) for language, block in found if language in languages]


def run_block(language: str, text: str, folder: Path) -> str:
    """What a block prints; it must succeed."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    done = subprocess.run(
        SHELLS[language],
        input=text,
        cwd=folder,
        env=os.environ | CPU | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def is_printed(line: str, output: str) -> bool:
    """Whether an output has a line; three dots stand for any text, a space for several."""
    parts = (re.escape(part).replace(r"\ ", r"\ +") for part in line.split("..."))
    return re.search(f"^{'.*'.join(parts)}$", output, re.MULTILINE) is not None


def run_page(text: str, folder: Path) -> None:
    """Runs the blocks marked `bash` and `python`, which print what `# prints:` says."""
    said = 0
    for language, block in blocks(text, *SHELLS):
        output = run_block(language, block, folder)
        for line in re.findall(r"^# prints: (.*)$", block, re.MULTILINE):
            assert is_printed(line, output), f"{line!r} is not in:\n{output}"
            said += 1
    assert said == text.count("\n# prints: ") > 0
