"""Converting from a repository, over HTTP, from a hub on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time

import pytest
from checkpoints import command, contents, convert_to, plan_of, run, write_tiny
from fake_hub import FakeHub

REPOSITORY = "someone/tiny-it"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A checkpoint of several files, and what its conversion gives."""
    folder = write_tiny(tmp_path_factory.mktemp("hub") / "tiny-it", shard_bytes=300_000)
    expected = folder.parent / "expected"
    convert_to(expected, plan_of(folder))
    return folder, contents(expected)


@pytest.fixture
def hub(shards):
    with FakeHub(shards[0]) as hub:
        yield hub


def convert(hub, tmp_path, *arguments, repository=REPOSITORY):
    return run(
        "--model", repository, "--mlx-path", tmp_path / "out", "-q", "--retries", 1, "--quiet",
        *arguments, env=hub.environment(tmp_path / "home"),
    )  # fmt: skip


def check(tmp_path, shards):
    result = contents(tmp_path / "out")
    for name, content in shards[1].items():
        if name not in ("conversion.json", "README.md"):
            assert result[name] == content, name
    record = json.loads(result["conversion.json"])
    assert (record["source"], record["source_revision"]) == (REPOSITORY, "a" * 40)
    assert f"base_model: {REPOSITORY}" in result["README.md"].decode()


def test_a_repository_gives_what_its_files_give(hub, shards, tmp_path):
    result = convert(hub, tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    check(tmp_path, shards)
    kept = list((tmp_path / "home").rglob("snapshots/*/model*.safetensors"))
    assert len(kept) == len(list(shards[0].glob("*.safetensors"))) > 2


def test_plan_fetches_headers_only(hub, shards, tmp_path):
    result = convert(hub, tmp_path, "--plan", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["stored_bytes"] == plan_of(shards[0]).stored_bytes()
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    assert not (tmp_path / "out.partial").exists()


def test_source_shards_are_deleted_one_by_one(hub, shards, tmp_path):
    held = []
    source = tmp_path / "out.partial" / "source"
    hub.watch = lambda name: held.append(len(list(source.glob("*.safetensors"))))
    result = convert(hub, tmp_path, "--delete-source-shards")
    assert result.returncode == 0, result.stderr
    check(tmp_path, shards)
    assert len(held) == len(list(shards[0].glob("*.safetensors")))
    assert max(held) <= 2  # the reader is 16 blocks ahead at most, and one shard has only 8
    assert not list((tmp_path / "home").rglob("model*.safetensors"))
    assert not (tmp_path / "out.partial").exists()


def test_a_download_that_is_cut_goes_on(hub, shards, tmp_path):
    hub.cut = 2
    assert convert(hub, tmp_path).returncode == 0
    assert hub.cut == 0
    check(tmp_path, shards)


@pytest.mark.parametrize("delete", [[], ["--delete-source-shards"]])
def test_a_lost_network_stops_it_and_it_goes_on(hub, shards, tmp_path, delete):
    names = sorted(path.name for path in shards[0].glob("*.safetensors"))
    hub.down = {names[2]}
    stopped = convert(hub, tmp_path, *delete)
    assert stopped.returncode == 1
    line = stopped.stderr.splitlines()[-1]
    assert line.startswith(
        f"error: {REPOSITORY} cannot be converted: {names[2]} cannot be fetched ("
    )
    assert line.endswith("then run the same command again: it goes on where it stopped.")
    hub.down, hub.served = set(), []
    assert convert(hub, tmp_path, *delete).returncode == 0
    check(tmp_path, shards)
    header = 110_000  # at most what is read of a shard for its header
    assert hub.bytes_of(names[0]) <= header < (shards[0] / names[0]).stat().st_size


def test_another_revision_is_refused_with_the_way_out(hub, shards, tmp_path):
    names = sorted(path.name for path in shards[0].glob("*.safetensors"))
    hub.down = {names[2]}
    assert convert(hub, tmp_path).returncode == 1
    hub.down, hub.sha = set(), "b" * 40
    moved = convert(hub, tmp_path)
    assert moved.returncode == 1
    assert moved.stderr.splitlines()[-1] == (
        f"error: {REPOSITORY} has moved from revision {'a' * 40} to {'b' * 40} since the "
        f"conversion into {tmp_path / 'out.partial'} began; add --revision {'a' * 40} to go on, "
        "or add --restart to begin anew."
    )
    assert convert(hub, tmp_path, "--restart").returncode == 0


@pytest.mark.parametrize(
    ("repository", "arguments", "message"),
    [
        ("nobody/nothing", [], "nobody/nothing does not exist, or is private; check the name"),
        ("someone/gated/", [], "no such folder"),
        ("gated/model", [], "gated/model is gated; accept its terms on its page, then log in"),
        (
            REPOSITORY,
            ["--revision", "v9"],
            f"{REPOSITORY} at revision 'v9' does not exist; see the branches",
        ),
    ],
)
def test_what_cannot_be_had_is_named(hub, tmp_path, repository, arguments, message):
    result = convert(hub, tmp_path, *arguments, repository=repository)
    assert result.returncode == 1
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_offline_it_takes_what_the_cache_has(hub, shards, tmp_path):
    offline = {**hub.environment(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    arguments = ("--model", REPOSITORY, "--mlx-path", tmp_path / "again", "-q", "--quiet")
    missing = run(*arguments, env=offline)
    assert missing.returncode == 1
    assert "(it is not in the local cache, and HF_HUB_OFFLINE is set); unset" in missing.stderr
    assert convert(hub, tmp_path).returncode == 0
    assert run(*arguments, env=offline).returncode == 0
    online, offline = contents(tmp_path / "out"), contents(tmp_path / "again")
    assert online["conversion.json"] == offline["conversion.json"]


def test_upload_sends_the_whole_folder(hub, tiny_4bit, tmp_path):
    environment = {**hub.environment(tmp_path / "home"), "HF_TOKEN": "hf_secret"}
    result = run("upload", tiny_4bit, "--upload-repo", "me/tiny-4bit", "--json", env=environment)
    assert result.returncode == 0, result.stderr
    assert hub.uploaded == contents(tiny_4bit)
    assert json.loads(result.stdout)["repository"] == "me/tiny-4bit"


def test_upload_without_login_stops_before_the_conversion(hub, tmp_path):
    result = convert(hub, tmp_path, "--upload-repo", "me/tiny-4bit")
    assert result.returncode == 1
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ") and "login" in line
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_ctrl_c_does_not_wait_for_a_download(hub, tmp_path):
    asked = threading.Event()

    def hang(name):
        asked.set()
        time.sleep(4)

    hub.watch = hang
    arguments = ("--model", REPOSITORY, "--mlx-path", tmp_path / "out", "-q", "--quiet")
    environment = {**os.environ, **hub.environment(tmp_path / "home")}
    process = subprocess.Popen(command(*arguments), env=environment, stderr=subprocess.PIPE)
    assert asked.wait(60)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    assert process.wait(60) == 130
    assert time.monotonic() - started < 3
    assert process.stderr.read() == b""


def test_no_network_at_all(tmp_path):
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    result = run(
        "--model", REPOSITORY, "--mlx-path", tmp_path / "out", "--retries", 0, env=unreachable
    )
    assert result.returncode == 1
    assert "its list of files cannot be fetched" in result.stderr
    assert "Traceback" not in result.stderr
