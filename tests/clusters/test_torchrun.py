"""Runs that torchrun started: the same numbers as Local on one host and on two, restarts, stops, refusals in words.

Everything is real: torchrun, its processes, kills, and network namespaces for hosts.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import torch
from tests.laws.reference import distance

import weft
from weft.cli import FIRST_WORD_S
from weft.clusters import pick_cluster
from weft.clusters.torchrun import Place, differences
from weft.compare import final_parameters
from weft.errors import ConfigError, Incompatible
from weft.events import read_events
from weft.testing import kill
from weft.testing.hosts import Host, hosts

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
JOB = {"steps": 60, "batch": 60, "save_every": 20, "seed": 5, "dtype": "float64"}
GONE_S = 20.0
LIMIT_S = 100.0

WHOLE = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RUN_ID": "job",
}


# -- what can be judged without processes


def test_the_environment_is_read_whole() -> None:
    place = Place.read(WHOLE | {"TORCHELASTIC_RUN_ID": "my/job 1"})
    assert (place.rank, place.world, place.local_rank, place.local_world, place.restart) == (1, 4, 1, 2, 0)
    assert place.job == "my_job_1", "it names a folder"
    assert not place.on_one_host


@pytest.mark.parametrize("name", sorted(WHOLE.keys() - {"TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID"}))
def test_an_environment_half_set_names_what_is_missing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in WHOLE.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv(name)
    with pytest.raises(ConfigError, match=rf"not whole.*{name} is not") as caught:
        weft.run("digits-mlp")
    assert "--cluster local" in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"RANK": "x"}, "RANK='x'"),
        ({"RANK": "4"}, "rank 4 of 4"),
        ({"LOCAL_WORLD_SIZE": "5"}, "1 of 5"),
        ({"MASTER_PORT": "-1"}, "MASTER_PORT='-1'"),
    ],
)
def test_an_environment_that_cannot_be_is_refused(wrong: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Place.read(WHOLE | wrong)


def test_without_torchrun_it_says_how_to_start() -> None:
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node 2 -m weft run"):
        weft.run("digits-mlp", cluster="torchrun")


def test_auto_means_torchrun_only_where_it_is_the_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_cluster("auto").name == "local"
    for key, value in WHOLE.items():
        monkeypatch.setenv(key, value)
    assert pick_cluster("auto").name == "torchrun"
    assert pick_cluster("local").name == "local"
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    with pytest.raises(ConfigError, match="process 1 of 4"):
        pick_cluster("auto")


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"workers": 3}, ConfigError, "workers=3 contradicts torchrun, which started 4"),
        ({"batch": 3}, ConfigError, "batch 3 is smaller than the world of 4"),
        ({"restarts": 2}, Incompatible, "--max-restarts 2"),
    ],
)
def test_what_contradicts_torchrun_is_refused(
    settings: dict[str, int], kind: type, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in WHOLE.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(kind, match=words):
        weft.run("digits-mlp", **settings)


@pytest.mark.parametrize(
    ("local_world", "world", "carrier"), [("2", "4", "hierarchical"), ("1", "4", "gloo"), ("2", "2", "gloo")]
)
def test_several_hosts_with_several_workers_share_memory_by_default(
    local_world: str, world: str, carrier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in (WHOLE | {"LOCAL_WORLD_SIZE": local_world, "LOCAL_RANK": "0", "WORLD_SIZE": world}).items():
        monkeypatch.setenv(key, value)
    cluster = pick_cluster("torchrun")
    assert cluster.default_carrier(int(world), "cpu")[0] == carrier
    assert cluster.default_carrier(int(world), "cuda")[0] == "nccl"
    cluster.check(carrier)
    if local_world == world:
        with pytest.raises(Incompatible, match="several hosts"):
            cluster.check("hierarchical")


@pytest.mark.parametrize("link", ["shm", "tcp", "inproc"])
def test_links_within_one_launcher_are_refused(link: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in WHOLE.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(Incompatible, match=rf"link '{link}'.*--link gloo"):
        pick_cluster("torchrun").check(link)


def test_insecure_is_refused_where_nothing_leaves_the_host() -> None:
    with pytest.raises(Incompatible, match="--insecure"):
        weft.run("digits-mlp", cluster="inprocess", insecure=True)


def test_an_unknown_interface_is_named() -> None:
    with pytest.raises(ConfigError, match="GLOO_SOCKET_IFNAME='nope7'.*lo"):
        Place.read(WHOLE).address({"GLOO_SOCKET_IFNAME": "nope7"})


def test_differences_name_rank_value_and_reference() -> None:
    mine = {"seed": "0", "steps": "5"}
    assert differences(mine, {1: mine, 2: dict(mine)}) == ""
    words = differences(mine, {1: mine | {"seed": "1"}, 2: mine, 3: mine | {"seed": "1"}, 4: {"seed": "0"}})
    assert "rank 1, 3 has seed: 1 (rank 0: 0)" in words
    assert "rank 4 has steps: nothing (rank 0: 5)" in words


# -- with processes


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What two local workers come to."""
    return final_parameters(
        weft.run("digits-mlp", workers=2, link="gloo", **JOB, run_dir=tmp_path_factory.mktemp("truth") / "run").run_dir
    )


def arguments(**settings: object) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def weft_run(run_dir: Path, *extra: str, **settings: object) -> list[str]:
    return ["run", "digits-mlp", *arguments(**{**JOB, **settings}), "--run-dir", str(run_dir), *extra]


def torchrun(*command: str, nproc: int = 2, options: tuple[str, ...] = (), **more: object) -> subprocess.Popen[str]:
    """One host. --standalone takes a free port."""
    return subprocess.Popen(
        [*TORCHRUN, "--standalone", "--nproc-per-node", str(nproc), *options, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def assert_bit_equal(run_dir: Path, truth: dict[str, torch.Tensor]) -> None:
    got = final_parameters(run_dir)
    assert got.keys() == truth.keys()
    assert all(torch.equal(got[n], truth[n]) for n in truth)


def wait_for(condition, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + LIMIT_S
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until, f"it did not begin within {LIMIT_S} s"
        time.sleep(0.02)


def ranks_of(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """torchrun's processes by rank."""
    found = {}
    for child in psutil.Process(process.pid).children():
        if rank := child.environ().get("RANK"):
            found[int(rank)] = child
    return found


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=GONE_S)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("share_store", [True, False])
def test_one_host_ends_with_the_parameters_of_local(tmp_path: Path, truth: dict, share_store: bool) -> None:
    """Also when torchrun leaves it to rank 0 to keep the store."""
    env = os.environ | ({} if share_store else {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
    code, out, err = finished(torchrun("-m", "weft", *weft_run(tmp_path / "run", "--json"), env=env))
    assert code == 0, err
    lines = out.splitlines()
    result = json.loads(lines[-1])
    assert len([line for line in lines if line.startswith("{")]) == 1, "only rank 0 prints"
    assert result["world"] == 2
    assert result["steps"] == 60
    assert (tmp_path / "run" / "result.json").exists()
    assert_bit_equal(tmp_path / "run", truth)


def on_two_hosts(pair: list[Host], arguments_: list[str], *options: str, nproc: int = 1) -> list[subprocess.Popen[str]]:
    """torchrun on each; the names of these hosts are not known to each other, so addresses are given."""
    started = []
    for k, host in enumerate(pair):
        meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{pair[0].address}:29400", "--rdzv-id", "two"]
        conf = ["--rdzv-conf", f"is_host={int(k == 0)}", "--local-addr", host.address]
        command = [*TORCHRUN, "--nnodes", "2", "--nproc-per-node", str(nproc), *meet, *conf, *options, *arguments_]
        started.append(host.popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return started


def ended_well(both: Sequence[subprocess.Popen[str]]) -> tuple[list[str], str]:
    """What each of them printed, and what they said on stderr."""
    done = [finished(process) for process in both]
    err = "".join(said for _, _, said in done)
    assert [code for code, _, _ in done] == [0, 0], err
    return [out for _, out, _ in done], err


@pytest.mark.hosts
@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_hosts_end_with_the_parameters_of_local(tmp_path: Path, truth: dict) -> None:
    with hosts(2, rate="100mbit") as pair:
        command = ["-m", "weft", *weft_run(tmp_path / "run", "--json", "--insecure")]
        out, err = ended_well(on_two_hosts(pair, command))
    printed = [text for text in out if text.strip()]  # either host may get rank 0
    assert len(printed) == 1, "only rank 0 prints"
    assert json.loads(printed[0].splitlines()[-1])["world"] == 2
    assert "--insecure" in err, "the plan says what is not safe"
    assert distance(final_parameters(tmp_path / "run"), truth) <= 1e-9


@pytest.mark.hosts
@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("pattern", ["sharded", "pipeline"])
def test_a_model_in_parts_on_two_hosts_is_that_of_local_and_predicts_by_their_link(
    tmp_path: Path, truth: dict, pattern: str
) -> None:
    with hosts(2, rate="100mbit") as pair:
        command = ["-m", "weft", *weft_run(tmp_path / "run", "--insecure", pattern=pattern)]
        ended_well(on_two_hosts(pair, command))
    link = json.loads((tmp_path / "run" / "plan.json").read_text())["step"]["link"]
    assert re.fullmatch(r"link (\d\d|1[01]\d)(\.\d+)? Mbit/s measured", link)
    assert distance(final_parameters(tmp_path / "run"), truth) <= 1e-9


@pytest.mark.hosts
@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_hosts_need_consent(tmp_path: Path) -> None:
    with hosts(2) as pair:
        here, there = on_two_hosts(pair, ["-m", "weft", *weft_run(tmp_path / "run")])
        (code, _, err), (other_code, _, other_err) = finished(here), finished(there)
    assert code != 0
    assert other_code != 0
    assert "several hosts (this one is 10.213.0." in err + other_err
    assert "add --insecure" in err + other_err
    assert not (tmp_path / "run").exists()


@pytest.mark.hosts
@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_host_that_is_lost_ends_the_run_on_the_other(tmp_path: Path) -> None:
    with hosts(2) as pair:
        here, there = on_two_hosts(pair, ["-m", "weft", *weft_run(tmp_path / "run", "--insecure", steps=200000)])
        wait_for(lambda: any((tmp_path / "run" / "checkpoints").glob("step-*")), here)
        everyone = psutil.Process(there.pid).children(recursive=True)
        rank_there = ranks_of(there).popitem()[0]
        there.kill()
        there.communicate()
        assert_gone(everyone)
        code, _, err = finished(here)
    assert code != 0
    gone = rf"the process of rank {rank_there}, which torchrun|rank 0's process, which drives the run, is gone"
    assert re.search(gone + "|worker . failed", err)


@pytest.mark.hosts
@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("collective", ["auto", "tree"])
def test_two_hosts_with_two_workers_each_end_with_the_parameters_of_local(
    tmp_path: Path, truth: dict, collective: str
) -> None:
    with hosts(2) as pair:
        command = weft_run(tmp_path / "run", "--insecure", collective=collective)
        ended_well(on_two_hosts(pair, ["-m", "weft", *command], nproc=2))
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["choices"]["link"].startswith("hierarchical (several hosts")
    assert plan["choices"]["collective"].startswith(collective)
    assert distance(final_parameters(tmp_path / "run"), truth) <= 1e-9
    sent = json.loads((tmp_path / "run" / "result.json").read_text())["bytes_sent"]
    assert sent == pytest.approx(60 * 4 * plan["links"][0]["bytes_per_step"], rel=0.05)


@pytest.mark.hosts
@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_worker_killed_on_one_host_is_named_on_the_other(tmp_path: Path) -> None:
    """Its rank is not its place on its host."""
    with hosts(2) as pair:
        command = program(
            tmp_path, run_dir=str(tmp_path / "run"), insecure=True, kills=[{"rank": 3, "step": 31}], deadline_s=20
        )
        here, there = on_two_hosts(pair, command, nproc=2)
        (code, _, err), (other_code, _, other_err) = finished(here), finished(there)
    assert code != 0
    assert other_code != 0
    assert "worker 3 failed" in err + other_err
    failed = [e for e in read_events(tmp_path / "run" / "events.jsonl") if e.kind == "failed"]
    assert [e.member for e in failed] == [3]


#: A user's own program, which every process runs; slow enough to be hit in the middle.
PROGRAM = """
import json, sys
import weft
from weft.cli import FIRST_WORD_S
from weft.testing import delay, kill

settings = json.loads(sys.argv[1])
faults = [delay(rank=0, seconds=0.05), *(kill(**k) for k in settings.pop("kills", []))]
result = weft.run("digits-mlp", faults=faults, **settings)
# One write each, for all share one stdout, and PYTHONUNBUFFERED may be set.
print(f"result {result.steps} {result.world} {result.loss}\\n", end="", flush=True)
"""


def program(folder: Path, **settings: object) -> list[str]:
    (folder / "program.py").write_text(PROGRAM)
    return [str(folder / "program.py"), json.dumps(JOB | settings)]


def only_run(folder: Path) -> Path:
    (found,) = (folder / "runs").iterdir()
    return found


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("rendezvous", ["standalone", "static"])
def test_torchrun_restarts_and_the_run_goes_on(tmp_path: Path, rank: int, rendezvous: str, truth: dict) -> None:
    """SIGKILL of one of torchrun's own processes, in the middle; then bit-equal to an undisturbed run. The folder of the
    run is found again by the rendezvous' id, or, where torchrun has none, by torchrun's process."""
    meet = ["--standalone"] if rendezvous == "standalone" else ["--master-port", free_port()]
    process = subprocess.Popen(
        [*TORCHRUN, *meet, "--nproc-per-node", "2", "--max-restarts", "1", *program(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    wait_for(lambda: any(tmp_path.glob("runs/*/checkpoints/step-*20")), process)
    ranks_of(process)[rank].kill()
    code, out, err = finished(process)
    assert code == 0, err
    results = [line for line in out.splitlines() if line.startswith("result 60 2 ")]
    assert len(results) == 2, f"every process gets the result: {out}{err}"
    assert len(set(results)) == 1
    run_dir = only_run(tmp_path)
    kinds = [e.kind for e in read_events(run_dir / "events.jsonl")]
    assert kinds.count("plan") == 2
    assert kinds.count("resumed") == 1
    assert_bit_equal(run_dir, truth)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_member_that_is_killed_is_named_and_restarted(tmp_path: Path, truth: dict) -> None:
    """Not torchrun's process but the worker within it."""
    command = program(tmp_path, run_dir=str(tmp_path / "run"), kills=[{"rank": 1, "step": 31}])
    code, _, err = finished(torchrun(*command, options=("--max-restarts", "1")))
    assert code == 0, err
    assert "worker 1 failed, last heard of after step" in err
    assert "killed by SIGKILL" in err
    assert_bit_equal(tmp_path / "run", truth)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_saves_and_resume_is_bit_equal(
    tmp_path: Path, number: signal.Signals, truth: dict
) -> None:
    """SIGINT goes to the whole group, as a terminal sends it, and torchrun repeats it: still it means once."""
    run_dir = tmp_path / "run"
    process = torchrun(*program(tmp_path, run_dir=str(run_dir)), start_new_session=True)
    wait_for(lambda: any((run_dir / "checkpoints").glob("step-*20")), process)
    everyone = psutil.Process(process.pid).children(recursive=True)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    code, _, _ = finished(process)
    assert code != 0
    assert_gone(everyone)
    events = list(read_events(run_dir / "events.jsonl"))
    stopped = [e.step for e in events if e.kind == "stopped"]
    assert len(stopped) == 1
    assert stopped[0] == [e.step for e in events if e.kind == "saved"][-1], "what was trained is saved, to the step"
    assert 20 <= stopped[0] < 60
    code, out, err = finished(torchrun("-m", "weft", "resume", str(run_dir), "--json"))
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["steps"] == 60
    assert_bit_equal(run_dir, truth)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_killing_torchrun_leaves_nothing(tmp_path: Path) -> None:
    process = torchrun(*program(tmp_path, run_dir=str(tmp_path / "run"), steps=200000))
    wait_for(lambda: any((tmp_path / "run" / "checkpoints").glob("step-*")), process)
    everyone = psutil.Process(process.pid).children(recursive=True)
    assert len(everyone) >= 6, "a process, a zygote and a worker for each rank"
    process.kill()
    process.communicate(timeout=GONE_S)
    assert_gone(everyone)
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_local_run_goes_on_under_torchrun(tmp_path: Path, truth: dict) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(weft.MemberFailed):
        weft.run("digits-mlp", workers=3, **JOB, run_dir=run_dir, faults=[kill(rank=0, step=30)])
    code, out, err = finished(torchrun("-m", "weft", "resume", str(run_dir), "--json"))
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["world"] == 2
    assert distance(final_parameters(run_dir), truth) <= 1e-9


# -- errors that only several processes can have


DIFFERENT = """
import os, sys
import weft.cli
sys.argv[1:] = [a.replace("%", os.environ["RANK"]) for a in sys.argv[1:]]
weft.cli.main()
"""


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["--seed", "%"], "rank 1 has seed: 1 (rank 0: 0)"),
        (["-t", "hidden=1%"], "rank 1 has task options: {'hidden': '11'} (rank 0: {'hidden': '10'})"),
        (["--run-dir", "run%"], "rank 1 has run-dir: run1 (rank 0: run0)"),
    ],
)
def test_processes_that_were_started_differently_are_refused(tmp_path: Path, changed: list[str], words: str) -> None:
    (tmp_path / "different.py").write_text(DIFFERENT)
    command = ["different.py", "run", "digits-mlp", *changed]
    code, _, err = finished(torchrun(*command, cwd=tmp_path))
    assert code != 0
    assert words in err
    assert err.count("not started alike") == 1, "it is told once"
    assert not list(tmp_path.glob("run*/*")), "nothing was started"


@pytest.mark.slow
@pytest.mark.multiprocess
def test_another_source_of_the_task_is_refused(tmp_path: Path) -> None:
    (tmp_path / "different.py").write_text(DIFFERENT)
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "mine.py").write_text(f"from weft.tasks.digits import DigitsMLP as Mine  # {rank}\n")
    code, _, err = finished(torchrun("different.py", "run", "%/mine.py:Mine", cwd=tmp_path))
    assert code != 0
    assert re.search(r"rank 1 has task source: [0-9a-f]{12} \(rank 0: [0-9a-f]{12}\)", err), err


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_same_task_at_another_place_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "different.py").write_text(DIFFERENT)
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "mine.py").write_text("from weft.tasks.digits import DigitsMLP as Mine\n")
    code, _, err = finished(torchrun("different.py", "run", "%/mine.py:Mine", "--steps", "3", cwd=tmp_path))
    assert code == 0, err


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--workers", "3"], "workers=3 contradicts torchrun, which started 2"),
        (["--batch", "1"], "batch 1 is smaller than the world of 2"),
        (["--link", "shm"], "link 'shm' joins processes of one launcher"),
        (["--restarts", "1"], "--max-restarts 1"),
    ],
)
def test_a_wrong_command_is_refused_once_and_in_words(tmp_path: Path, options: list[str], words: str) -> None:
    code, out, err = finished(torchrun("-m", "weft", "run", "digits-mlp", *options, cwd=tmp_path))
    assert code != 0
    assert words in " ".join(err.split())
    assert err.count("error: ") == 1, err
    assert "{" not in out
    assert not any(tmp_path.glob("runs/*"))


SLOW_OF_SPEECH = f"""
import time
from weft import cli
from weft.report import terminal

fast = terminal.render_error
terminal.render_error = lambda error: (time.sleep({FIRST_WORD_S + 2}), fast(error))[1]
cli.main()
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_rank_0_says_why_though_the_others_ended_before_it_had(tmp_path: Path) -> None:
    script = tmp_path / "slow_of_speech.py"
    script.write_text(SLOW_OF_SPEECH)
    code, _, err = finished(torchrun(str(script), "run", "digits-mlp", "--link", "shm", cwd=tmp_path))
    assert code != 0
    assert "\nerror: link 'shm' joins processes of one launcher" in err
    assert "During handling" not in err, err
