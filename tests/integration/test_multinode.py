"""One run over several hosts: hosts are lost, cut off and joined while it goes on.

Hosts are network namespaces (tests/multinode/hosts.py). The run directory is shared; all else goes over the network.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.runs import Run, adopt
from tests.multinode.hosts import Hosts, ip_command, why_no_hosts
from tests.multinode.jobs import (
    SCRIPTED,
    assert_nothing_counted_twice,
    assert_nothing_lost,
    discovery_url,
    notes,
    places,
    start_job,
    targets,
    wait_until,
)
from tests.prometheus_tools import Prometheus, require, scrape_config

MISSING = why_no_hosts()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(420),
    pytest.mark.skipif(MISSING is not None, reason=MISSING or ""),
]

BATCH = 32
BOOT_S, EVENT_S = 180.0, 60.0
LOSS_S = 30.0
"""Ray gives a silent host up after 15 s (keel/ray_environment.py); the run's list of targets follows within 15 s."""
# Every CPU of the three hosts is taken, so what is replaced must go to a host that joins.
ROOM = ["rollout.actors=3", "placement.spread=spread", "rollout.cpus_per_actor=1", "redis.lease_s=5"]
HEAD_CPUS, OTHER_CPUS = 3, 1


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with Hosts.start(3, head_cpus=HEAD_CPUS, cpus=OTHER_CPUS) as started:
        yield started


def endless_job(hosts: Hosts, prepared: Path, runs_dir: Path, *, name: str) -> Run:
    """A job that goes on until it is stopped, with a rollout actor on each host and some steps done."""
    adopt(prepared, runs_dir, name=name)
    run = start_job(hosts, runs_dir, name=name, changes=[*SCRIPTED, *ROOM, "learner.steps=100000"])
    run.wait_for(lambda: len(run.metrics()) >= 3, what="three steps", timeout_s=BOOT_S)
    return run


def bystander(hosts: Hosts) -> int:
    """A host with a rollout actor and no learner, other than the head."""
    learners = {place.host for place in places(hosts, "LearnerActor")}
    rollout = {place.host for place in places(hosts, "RolloutActor")}
    return max(rollout - learners - {0})


def go_on(run: Run, *, steps: int, what: str) -> None:
    wanted = len(run.metrics()) + steps
    run.wait_for(lambda: len(run.metrics()) >= wanted, what=f"{steps} steps {what}", timeout_s=EVENT_S)


def stop(run: Run) -> None:
    """As a user does. Every step so far is whole."""
    run.interrupt(signal.SIGTERM)
    output = run.finish(timeout_s=EVENT_S)
    assert run.process.returncode == 130, output
    assert_nothing_counted_twice(run.metrics(), batch_size=BATCH)


def finish(hosts: Hosts, run: Run) -> None:
    """Stop, then go on for a few steps on the cluster as it is now, to the end: nothing is outstanding then."""
    stop(run)
    last = len(run.metrics())
    again = start_job(hosts, run.path.parent, name=run.path.name,
                      changes=[*SCRIPTED, *ROOM, f"learner.steps={last + 3}"])  # fmt: skip
    output = again.finish(timeout_s=BOOT_S)
    assert again.process.returncode == 0, output
    assert len(run.metrics()) == last + 3
    assert_nothing_counted_twice(run.metrics(), batch_size=BATCH)
    assert_nothing_lost(run)


def test_a_host_is_lost_and_another_joins(hosts: Hosts, prepared_run: Path, tmp_path: Path) -> None:
    run = endless_job(hosts, prepared_run, tmp_path, name="hosts")
    assert len(places(hosts, "RolloutActor")) == 3
    lost = bystander(hosts)
    hosts.lose(lost)
    go_on(run, steps=10, what="without a host")
    new = hosts.join().number
    wait_until(lambda: any(place.host == new for place in places(hosts, "RolloutActor")),
               what="actor on the new host", timeout_s=EVENT_S)  # fmt: skip
    address = hosts.all[new].address

    def scraped() -> bool:
        listed = targets(hosts, discovery_url(run))
        found = [group["targets"][0] for group in listed
                 if group["labels"]["role"] == "rollout" and group["targets"][0].startswith(f"{address}:")]  # fmt: skip
        return bool(found) and "keel_rollout_samples_total 0.0" not in hosts.http(0, f"http://{found[0]}/metrics")

    wait_until(scraped, what="samples of the new host's actor", timeout_s=EVENT_S)
    assert any("replaced" in line for line in notes(run))
    finish(hosts, run)


def test_a_host_that_was_cut_off_and_comes_back_counts_nothing_twice(
    hosts: Hosts, prepared_run: Path, tmp_path: Path
) -> None:
    run = endless_job(hosts, prepared_run, tmp_path, name="cut")
    cut = bystander(hosts)
    hosts.cut(cut)
    wait_until(lambda: any("health check" in line or "node died" in line or "replaced" in line for line in notes(run)),
               what="word of the lost host", timeout_s=LOSS_S + EVENT_S)  # fmt: skip
    go_on(run, steps=5, what="without the host")
    assert places_on(hosts, cut), "the host's actor should still be running, unaware"
    hosts.mend(cut)
    wait_until(lambda: not places_on(hosts, cut), what="end of the given-up actor", timeout_s=EVENT_S)
    go_on(run, steps=5, what="after the host came back")
    stop(run)


def places_on(hosts: Hosts, number: int) -> list[int]:
    return [place.pid for place in places(hosts, "RolloutActor") if place.host == number]


def test_prometheus_sees_every_process_on_every_host(hosts: Hosts, prepared_run: Path, tmp_path: Path) -> None:
    require("prometheus")
    run = endless_job(hosts, prepared_run, tmp_path, name="watched")
    head = hosts.all[0]
    roles = {"driver": 1, "learner": 1, "reward": 1, "rollout": 3, "ray": 3}
    with Prometheus(
        scrape_config(http_sd=[discovery_url(run)]),
        directory=tmp_path / "prometheus",
        host=head.address,
        port=9090,
        prefix=[ip_command(), "netns", "exec", head.namespace],
        fetch=lambda url: hosts.http(0, url),
    ) as prometheus:
        prometheus.wait_all_up(roles, timeout_s=EVENT_S)
        addresses = {target.url.split("/")[2].split(":")[0] for target in prometheus.targets()}
        assert addresses == {host.address for host in hosts.all}
        assert_sums(prometheus, run)

        victim = next(place for place in places(hosts, "RolloutActor") if place.host != 0)
        instances = {target.labels["instance"] for target in prometheus.targets() if target.labels["role"] == "rollout"}
        os.kill(victim.pid, signal.SIGKILL)
        prometheus.wait_for(lambda: len(instances & up(prometheus)) == 2, what="killed target down", timeout_s=15.0)

        lost = bystander(hosts)
        hosts.lose(lost)
        gone = hosts.all[lost].address
        prometheus.wait_for(
            lambda: not any(gone in target.url and target.health == "up" for target in prometheus.targets()),
            what="lost host's targets down", timeout_s=15.0,
        )  # fmt: skip
        prometheus.wait_for(
            lambda: not any(gone in target.url for target in prometheus.targets()),
            what="lost host's targets gone", timeout_s=LOSS_S + EVENT_S,
        )  # fmt: skip
        assert_sums(prometheus, run)
    stop(run)


def up(prometheus: Prometheus) -> set[str]:
    return {target.labels["instance"] for target in prometheus.targets()
            if target.labels["role"] == "rollout" and target.health == "up"}  # fmt: skip


def assert_sums(prometheus: Prometheus, run: Run) -> None:
    """A counter that is scraped every second lies between what the run's own record says before and after."""
    before = run.metrics()[-1]["samples_trained"]
    prometheus.wait_for(
        lambda: prometheus.value("sum(keel_samples_trained_total)") >= before, what="trained samples", timeout_s=EVENT_S
    )
    trained = prometheus.value("sum(keel_samples_trained_total)")
    run.wait_for(lambda: run.metrics()[-1]["samples_trained"] >= trained, what="record of it", timeout_s=EVENT_S)
    # Counters of actors that ended are in Prometheus still, as the last that was scraped of them.
    answered = prometheus.value("sum(max_over_time(keel_rollout_samples_total[1h]))")
    assert answered + 3 * 2 * BATCH >= trained, "three actors, each scraped up to a batch or two ago"


def test_a_host_that_lacks_the_run_directory_is_named(prepared_run: Path, tmp_path: Path) -> None:
    with Hosts.start(1, head_cpus=2) as hosts:  # The learner and the reward worker fill it: actors go elsewhere.
        hosts.join(without=tmp_path)
        adopt(prepared_run, tmp_path, name="unshared")
        changes = [*SCRIPTED, "rollout.cpus_per_actor=1", "reward.cpus_per_worker=1"]
        run = start_job(hosts, tmp_path, name="unshared", changes=changes)
        output = run.finish(timeout_s=BOOT_S)
    assert run.process.returncode == 2, output
    assert "unshared is not there on" in " ".join(output.split())
    assert "runs_dir" in output
