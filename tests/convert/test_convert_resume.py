from __future__ import annotations

import contextlib
import json
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import mlx.core as mx
import pytest
from checkpoints import (
    command,
    contents,
    convert_to,
    plan_of,
    read_weights,
    run,
    write_tiny,
    write_weights,
)

from mlx_diffgemma.errors import CheckpointError, UsageError
from mlx_diffgemma_convert import stream
from mlx_diffgemma_convert.journal import Journal

SHARD = "100kB"


class StopHereError(Exception):
    """Raised in the middle of a conversion, as if the process had died there."""


def stop_after(blocks: int):
    def progress(target, source_bytes, left=[blocks]):  # noqa: B006
        left[0] -= 1
        if left[0] < 0:
            raise StopHereError

    return progress


def interrupt(target: Path, plan, blocks: int) -> None:
    with contextlib.suppress(StopHereError):
        convert_to(target, plan, progress=stop_after(blocks))
        raise AssertionError("the conversion was to be interrupted")


@pytest.fixture
def undisturbed(tiny_source, tmp_path):
    convert_to(tmp_path / "undisturbed", plan_of(tiny_source, shard_size=SHARD))
    return contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("notes", [1 << 40, 1])
def test_stopped_at_every_moment_it_goes_on_to_the_same_bytes(
    tiny_source, tmp_path, undisturbed, monkeypatch, notes
):
    """Whether the current file is begun anew (`notes` never come) or gone on with."""
    monkeypatch.setattr(stream, "_NOTE_BYTES", notes)
    plan = plan_of(tiny_source, shard_size=SHARD)
    for blocks in range(0, len(plan.targets), 11):
        target = tmp_path / f"out{blocks}"
        interrupt(target, plan, blocks)
        assert not target.exists()
        outcome = convert_to(target, plan)
        assert contents(target) == undisturbed
        assert not target.with_name(f"{target.name}.partial").exists()
    assert outcome.resumed_files > 0


def test_finished_files_are_not_written_again(tiny_source, tmp_path):
    plan = plan_of(tiny_source, shard_size=SHARD)
    interrupt(tmp_path / "out", plan, 40)
    result = tmp_path / "out.partial" / "result"
    before = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in result.glob("*.safetensors")}
    assert before
    convert_to(tmp_path / "out", plan)
    after = {
        p.name: (p.stat().st_ino, p.stat().st_mtime_ns)
        for p in (tmp_path / "out").glob("*.safetensors")
    }
    assert before.items() <= after.items()


@pytest.mark.slow
def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(tmp_path):
    source = write_tiny(tmp_path / "source", layers=12)
    arguments = (
        "--model", source, "--recipe", "4bit", "--max-shard-size", "60kB", "--quiet",
    )  # fmt: skip
    started = time.monotonic()
    assert run(*arguments, "--mlx-path", tmp_path / "undisturbed").returncode == 0
    whole = time.monotonic() - started
    expected = contents(tmp_path / "undisturbed")
    dice, kills, tries, target = random.Random(0), 0, 0, tmp_path / "out"
    partial = tmp_path / "out.partial"
    while kills < 12:
        tries += 1
        assert tries < 60, f"only {kills} kills hit a running conversion"
        process = subprocess.Popen(command(*arguments, "--mlx-path", target))
        while not (partial / "journal.json").exists() and process.poll() is None:
            time.sleep(0.002)
        time.sleep(dice.uniform(0, whole / 4))
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            kills += 1
        if target.exists():
            assert run(*arguments, "--mlx-path", target).returncode == (
                0 if partial.exists() else 2
            )
            assert contents(target) == expected
            shutil.rmtree(target)
    finished = run(*arguments, "--mlx-path", target)
    assert finished.returncode == 0, finished.stderr
    assert contents(target) == expected
    assert not partial.exists()


def test_a_file_size_limit_stops_it_cleanly_and_it_goes_on(tiny_source, tmp_path, undisturbed):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))

    arguments = (
        "--model", tiny_source, "--mlx-path", tmp_path / "out", "-q", "--max-shard-size", SHARD,
    )  # fmt: skip
    full = run(*arguments, preexec_fn=limit)
    assert full.returncode == 1
    assert full.stderr.splitlines()[-1].startswith(
        f"error: no room left for {tmp_path / 'out.partial'}; free "
    )
    assert "run the same command again: it goes on where it stopped" in full.stderr
    assert not (tmp_path / "out").exists()
    assert run(*arguments).returncode == 0
    assert contents(tmp_path / "out") == undisturbed


def mounted(folder: Path, size: str, script: str) -> list[str]:
    """A shell script with a small tmpfs at `folder`, in a mount namespace of its own."""
    mount = f"mount -t tmpfs -o size={size} none {folder} && {script}"
    return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount]


def test_a_full_disk_stops_it_cleanly_and_it_goes_on(tiny_source, tmp_path, undisturbed):
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        subprocess.run(mounted(disk, "1m", "true"), check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):  # no namespaces here: the kernel's other limit
        return test_a_file_size_limit_stops_it_cleanly_and_it_goes_on(
            tiny_source, tmp_path, undisturbed
        )
    stored = plan_of(tiny_source, shard_size=SHARD).stored_bytes()
    arguments = " ".join(
        f"'{part}'"
        for part in command(
            "--model", tiny_source, "--mlx-path", disk / "out", "-q", "--quiet",
            "--max-shard-size", SHARD,
        )
    )  # fmt: skip
    script = (
        f"head -c 300000 /dev/zero > {disk}/ballast; {arguments} 2> {tmp_path}/early; "
        f"rm {disk}/ballast; {arguments} 2> {tmp_path}/full; ls {disk} > {tmp_path}/left; "
        f"mount -o remount,size=8m {disk}; {arguments}; cp -r {disk}/out {tmp_path}/out"
    )
    subprocess.run(mounted(disk, str(stored + 45_000), script), check=True)
    early = (tmp_path / "early").read_text()
    assert "free, the conversion needs 0.7 MB; free some, choose another --mlx-path" in early
    full = (tmp_path / "full").read_text()
    assert full.startswith(f"error: no room left for {disk / 'out.partial'}; free ")
    assert (tmp_path / "left").read_text().split() == ["out.partial"]
    assert contents(tmp_path / "out") == undisturbed


def test_other_settings_than_at_first_are_refused(tiny_source, tmp_path):
    target = tmp_path / "out"
    interrupt(target, plan_of(tiny_source, shard_size=SHARD), 40)
    with pytest.raises(UsageError) as error:
        convert_to(target, plan_of(tiny_source, "8bit", shard_size=SHARD))
    assert str(error.value) == (
        f"{target}.partial was begun with another recipe and rules; run the same command as then, "
        "or add --restart to begin anew."
    )
    convert_to(target, plan_of(tiny_source, "8bit", shard_size=SHARD), restart=True)
    convert_to(tmp_path / "fresh", plan_of(tiny_source, "8bit", shard_size=SHARD))
    assert contents(target) == contents(tmp_path / "fresh")


def test_a_source_that_changed_is_refused(tmp_path):
    source = write_tiny(tmp_path / "source")
    target = tmp_path / "out"
    interrupt(target, plan_of(source, shard_size=SHARD), 40)
    weights = read_weights(source)
    weights["model.decoder.embed_tokens.weight"][0, 0] += 1
    write_weights(source, weights)
    with pytest.raises(CheckpointError, match=r"has changed since the conversion into .*--restart"):
        convert_to(target, plan_of(source, shard_size=SHARD))
    convert_to(target, plan_of(source, shard_size=SHARD), restart=True)
    result = read_weights(target)
    expected = mx.quantize(weights["model.decoder.embed_tokens.weight"], bits=8)[0]
    assert mx.array_equal(result["model.decoder.embed_tokens.weight"], expected)


@pytest.mark.parametrize("changed", [False, True])
def test_a_source_that_only_looks_touched_is_compared(tmp_path, changed):
    """The first of two shards is converted already; its time of change is another now."""
    source = write_tiny(tmp_path / "source", layers=2, shard_bytes=200_000)
    target = tmp_path / "out"
    plan = plan_of(source, shard_size=SHARD)
    first = "model-00001-of-"
    count = sum(all(s.startswith(first) for s in t.shards) for t in plan.targets)
    interrupt(target, plan, len(plan.targets) - 1)
    assert count < len(plan.targets) - 1
    shard = next(source.glob(f"{first}*"))
    content = bytearray(shard.read_bytes())
    if changed:
        content[-9] ^= 1
    shard.write_bytes(content)
    if not changed:
        convert_to(target, plan)
        return
    with pytest.raises(CheckpointError, match=rf"source: {shard.name} has changed since"):
        convert_to(target, plan)


def test_results_that_were_removed_are_made_again(tiny_source, tmp_path, undisturbed):
    plan = plan_of(tiny_source, shard_size=SHARD)
    interrupt(tmp_path / "out", plan, 60)
    next((tmp_path / "out.partial" / "result").glob("*.safetensors")).unlink()
    convert_to(tmp_path / "out", plan)
    assert contents(tmp_path / "out") == undisturbed


def test_two_conversions_into_one_target_exclude_each_other(tiny_source, tmp_path):
    with (
        Journal(tmp_path / "out"),
        pytest.raises(UsageError, match="is in use by another conversion; wait for it"),
    ):
        convert_to(tmp_path / "out", plan_of(tiny_source))
    assert not (tmp_path / "out.partial").exists()


def test_a_run_stopped_before_the_very_last_step_is_completed(tiny_source, tmp_path, monkeypatch):
    target = tmp_path / "out"
    monkeypatch.setattr(Journal, "discard", lambda self: (_ for _ in ()).throw(StopHereError))
    with pytest.raises(StopHereError):
        convert_to(target, plan_of(tiny_source))
    assert target.exists() and (tmp_path / "out.partial" / "journal.json").exists()
    before = contents(target)
    again = run("--model", tiny_source, "--mlx-path", target, "-q", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["recipe"] == "4bit"
    assert contents(target) == before
    assert not (tmp_path / "out.partial").exists()
