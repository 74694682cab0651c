"""The plan: places, what is impossible and what would mend it, the gate before a run, and the command."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.errors import ConfigError
from configs.load import load_config, preset_names
from configs.run import RunConfig
from keel.cli import app
from keel.planning.gate import check_this_machine
from keel.planning.placement import Process, assign
from keel.planning.plan import (
    Plan,
    impossible_anywhere,
    make_plan,
    require_placeable,
    unplaceable,
    wait_until_placeable,
)
from keel.planning.table import plan_data, plan_text
from keel.planning.view import ClusterView, NodeView, cpus_needed, visible_gpus, wants_gpus

GIB = 1 << 30
QWEN_7B = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
}  # fmt: skip
LLAMA_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
}  # fmt: skip
HUGE_ENGINE = ("rollout.gpus_per_actor=100", "rollout.tensor_parallel_size=100")
ONLINE = "stages=[data, ppo, evaluate, report]"


def node(name: str = "n0", **changes: Any) -> NodeView:
    facts: dict[str, Any] = {"cpus": 96.0, "gpus": 8.0, "gpu_bytes": 79 * GIB, "memory_bytes": 1000 * GIB,
                             "driver": True}  # fmt: skip
    return NodeView(name, **(facts | {"object_store_bytes": 100 * GIB, "shm_bytes": 500 * GIB} | changes))


def cluster(*nodes: NodeView, **facts: Any) -> ClusterView:
    return ClusterView(nodes or (node(),), **facts)


REFRESH = "rm.refresh={judge: 'm:f'}"


@pytest.fixture
def seven(tmp_path: Path) -> Callable[..., RunConfig]:
    """The 7 B preset around a model of these sizes."""

    def make(*overrides: str, sizes: dict[str, Any] = QWEN_7B) -> RunConfig:
        (tmp_path / "config.json").write_text(json.dumps(sizes))
        return load_config("ppo_7b_8gpu", overrides=[f"model.path={tmp_path}", *overrides])

    return make


def found(plan: Plan, area: str) -> str:
    """What is impossible there, and the remedy."""
    return " | ".join(f"{one.what} → {one.do}" for one in plan.impossible if one.area == area)


# ---------------------------------------------------------------- presets


@pytest.mark.parametrize("name", [name for name in preset_names() if name != "ppo_7b_8gpu"])
def test_cpu_presets_fit_a_small_machine(name: str) -> None:
    config = load_config(name)
    small = node(cpus=4.0, gpus=0.0, gpu_bytes=None, memory_bytes=8 * GIB, object_store_bytes=128 << 20)
    assert unplaceable(config, cluster=cluster(small)) is None


@pytest.mark.parametrize("sizes", [QWEN_7B, LLAMA_7B], ids=["qwen", "llama"])
def test_the_7b_preset_fits_eight_gpus(seven: Callable[..., RunConfig], sizes: dict[str, Any]) -> None:
    """All its stages, with room to spare."""
    config = seven(sizes=sizes)
    plan = make_plan(config, cluster=cluster(node(object_store_bytes=config.ray.object_store_mib << 20)))
    assert plan.findings == ()
    assert {role.name: role.processes for role in plan.roles if role.online} == {
        "learner": 4, "rollout": 3, "reward": 1,
    }  # fmt: skip


def test_offline_stages_of_7b_do_not_fit_one_gpu(seven: Callable[..., RunConfig]) -> None:
    """16 B a parameter alone are more than a card."""
    plan = make_plan(seven("sft.epochs=1", "rm.models=[]"), cluster=cluster())
    assert {one.area for one in plan.impossible} == {"sft", "rm"}
    assert "sft.epochs=0" in found(plan, "sft")
    assert "rm.models=" in found(plan, "rm")


def test_models_taken_as_they_are_need_no_training(seven: Callable[..., RunConfig]) -> None:
    sizes = {role.name: role.footprint for role in make_plan(seven(), cluster=cluster()).roles}
    assert sizes["sft"].gpu == {}
    assert {"gradients", "optimiser"}.isdisjoint(sizes["rm"].gpu)
    wide = make_plan(seven("reward.dtype=float32"), cluster=cluster(node(gpu_bytes=40 * GIB)))
    assert "measuring a reward model in float32" in found(wide, "rm")
    assert "reward.dtype=bfloat16" in found(wide, "rm")


def test_the_process_that_refreshes_the_reward_model_has_its_place(seven: Callable[..., RunConfig]) -> None:
    plan = make_plan(seven(REFRESH, "rm.refresh.cpus=3"), cluster=cluster())
    (role,) = [role for role in plan.roles if role.name == "refresh"]
    assert (role.processes, role.cpus, role.gpus, role.nodes, role.online) == (1, 3.0, 0.0, 1, True)
    assert role.footprint.gpu == {}, "without a GPU it trains on the CPU"
    assert role.footprint.host["optimiser"] > 8 * 6_000_000_000
    assert "refresh" in plan_text(plan)
    crowded = make_plan(seven(REFRESH, "rm.refresh.cpus=90"), cluster=cluster())
    assert "less rm.refresh.cpus" in found(crowded, "refresh")
    assert not [role for role in make_plan(seven(REFRESH, "stages=[data, sft, rm]"), cluster=cluster()).roles
                if role.name == "refresh"]  # fmt: skip


def test_a_refresh_on_a_gpu_must_fit_it(seven: Callable[..., RunConfig]) -> None:
    one = ("rollout.actors=1", REFRESH, "rm.refresh.gpus=1", "rm.members=1")
    plan = make_plan(seven(*one), cluster=cluster())
    assert "training a reward model" in found(plan, "refresh")
    assert "rm.refresh.gpus=0" in found(plan, "refresh")
    assert "training a reward model" not in found(
        make_plan(seven(*one), cluster=cluster(node(gpu_bytes=2000 * GIB))), "refresh"
    )
    none = make_plan(seven(*one), cluster=cluster(node(gpus=0.0, gpu_bytes=None)))
    assert "rm.refresh.gpus=0" in found(none, "refresh")
    idle = make_plan(load_config("demo_online", overrides=["rm.refresh.gpus=1"]), cluster=cluster())
    assert [finding.do for finding in idle.findings if finding.area == "refresh"] == ["rm.refresh.gpus=0"]
    assert wants_gpus(load_config("demo_online", overrides=["rm.refresh.gpus=1"]))


def test_a_local_ray_has_room_for_the_refresh() -> None:
    config = load_config("demo_online")
    wide = load_config("demo_online", overrides=["rm.refresh.cpus=40", "ray.num_cpus=null"])
    assert cpus_needed(wide) - cpus_needed(config) == 39.5
    assert unplaceable(wide, cluster=ClusterView.of_this_machine(wide)) is None


# ---------------------------------------------------------------- places


def test_processes_go_where_their_gpus_and_cpus_are() -> None:
    engine, scorer = Process("rollout", 4, 2, 0, 0), Process("reward", 1, 0, 0, 0)
    made = assign([scorer, engine, engine], cluster=cluster(node("gpu", gpus=4.0, cpus=9.0), node("cpu", gpus=0.0)))
    assert made.left == ()
    assert {load.view.name: load.roles for load in made.nodes} == {"gpu": ("rollout", "rollout"), "cpu": ("reward",)}


def test_an_engine_is_not_split_over_nodes() -> None:
    made = assign([Process("rollout", 1, 4, 0, 0)], cluster=cluster(node("a", gpus=2.0), node("b", gpus=2.0)))
    assert len(made.left) == 1


def test_shares_fill_a_gpu_before_the_next() -> None:
    half = Process("reward", 1, 0.5, 0, 10)
    made = assign([half, half, Process("learner", 1, 1.0, 0, 5)], cluster=cluster(node(gpus=2.0)))
    assert made.left == ()
    assert made.nodes[0].gpu_bytes == 20


# ---------------------------------------------------------------- what is impossible


def test_more_gpus_wanted_than_there(seven: Callable[..., RunConfig]) -> None:
    plan = make_plan(seven(ONLINE, "rollout.actors=6"), cluster=cluster())
    assert "3 process(es) of 1 GPU" in found(plan, "rollout") or "rollout.actors=" in found(plan, "rollout")
    assert found(plan, "learner") == ""


def test_no_gpu_at_all_names_the_setting(seven: Callable[..., RunConfig]) -> None:
    plan = make_plan(seven(ONLINE), cluster=cluster(node(gpus=0.0, gpu_bytes=None)))
    assert "learner.gpus_per_rank=0" in found(plan, "learner")
    assert "rollout.gpus_per_actor=0" in found(plan, "rollout")


@pytest.mark.parametrize("trouble", ["learner.gradient_checkpointing=false", "learner.token_budget=65536"])
def test_every_remedy_for_the_learner_is_one(seven: Callable[..., RunConfig], trouble: str) -> None:
    remedies = found(make_plan(seven(ONLINE, trouble), cluster=cluster()), "learner").split(" → ")[1].split(" or ")
    assert len(remedies) > 1
    for remedy in remedies:
        settings = re.sub(r" \(.*\)", "", remedy).removeprefix("together ")
        changes = re.findall(r"\S+=(?:\{.*?\}|\S+)", settings)
        again = make_plan(seven(ONLINE, trouble, *changes), cluster=cluster(node(gpus=128.0, cpus=999.0)))
        assert found(again, "learner") == "", remedy


def test_the_remedy_for_one_rank_mends_it(seven: Callable[..., RunConfig]) -> None:
    remedy = found(make_plan(seven(ONLINE, "learner.ranks=1"), cluster=cluster()), "learner")
    ranks = remedy.split("learner.ranks=")[1].split()[0]
    assert found(make_plan(seven(ONLINE, f"learner.ranks={ranks}"), cluster=cluster(node(gpus=64.0))), "learner") == ""


def test_tensor_parallelism_must_divide_the_heads(seven: Callable[..., RunConfig]) -> None:
    plan = make_plan(
        seven(ONLINE, "rollout.tensor_parallel_size=8", "rollout.gpus_per_actor=8", "rollout.actors=1"),
        cluster=cluster(node("a"), node("b")),
    )
    assert "does not divide 28 attention heads" in found(plan, "rollout")
    assert "rollout.tensor_parallel_size=4" in found(plan, "rollout")


def test_an_engine_without_room_for_its_cache_is_split(seven: Callable[..., RunConfig]) -> None:
    plan = make_plan(seven(ONLINE), cluster=cluster(node(gpu_bytes=16 * GIB)))
    assert "rollout.tensor_parallel_size=2 rollout.gpus_per_actor=2" in found(plan, "rollout")


def test_a_cache_too_small_for_one_sequence_on_a_cpu() -> None:
    config = load_config("demo", overrides=["rollout.kv_cache_gib=0.0001"])
    assert "rollout.kv_cache_gib=" in found(make_plan(config, cluster=cluster(node(gpus=0.0))), "rollout")


def test_the_reward_worker_holds_every_member(seven: Callable[..., RunConfig]) -> None:
    two = seven(ONLINE, "rm.models=[a, b]", "reward.dtype=float32")
    assert "2 reward model(s) and the reference in float32" in found(make_plan(two, cluster=cluster()), "reward")
    assert "reward.dtype=bfloat16 or one of rm.models" in found(make_plan(two, cluster=cluster()), "reward")
    halved = seven(ONLINE, "rm.models=[a, b]")
    assert found(make_plan(halved, cluster=cluster()), "reward") == ""
    trained = seven(ONLINE, "rm.models=[]", "rm.members=5")
    assert "rm.members=1" in found(make_plan(trained, cluster=cluster()), "reward")


def test_the_object_store_holds_two_versions(seven: Callable[..., RunConfig]) -> None:
    plan = make_plan(seven(ONLINE), cluster=cluster(node(object_store_bytes=24 * GIB)))
    assert "ray.object_store_mib=" in found(plan, "object store")
    whole = make_plan(seven(ONLINE, "rollout.dtype=float32"), cluster=cluster(node(object_store_bytes=32 * GIB)))
    assert "28.4 GiB (float32)" in found(whole, "object store")
    tight = make_plan(seven(ONLINE), cluster=cluster(node(object_store_bytes=32 * GIB)))
    assert found(tight, "object store") == ""
    assert any(one.area == "object store" for one in tight.findings)


def test_the_board_s_node_holds_more_versions_than_the_engines(seven: Callable[..., RunConfig]) -> None:
    """14.2 GiB each. A node that only scores holds none."""

    def trouble(driver: int, learner: int, engine: int, scorer: int) -> set[tuple[str, str]]:
        sizes = {"driver": driver, "learner": learner, "engine": engine, "scorer": scorer}
        gpus = {"driver": 0.0, "learner": 4.0, "engine": 3.0, "scorer": 1.0}
        nodes = [
            node(name, gpus=gpus[name], object_store_bytes=size * GIB, driver=name == "driver")
            for name, size in sizes.items()
        ]
        plan = make_plan(seven(ONLINE), cluster=cluster(*nodes, joined=True))
        assert {load.view.name: set(load.roles) for load in plan.assignment.nodes} == {
            "driver": set(), "learner": {"learner"}, "engine": {"rollout"}, "scorer": {"reward"},
        }  # fmt: skip
        return {(one.severity, one.what.split()[3]) for one in plan.findings if one.area == "object store"}

    assert trouble(45, 30, 30, 1) == set()
    assert trouble(20, 30, 30, 1) == {("impossible", "driver")}
    assert trouble(30, 30, 30, 1) == {("tight", "driver")}
    assert trouble(45, 30, 14, 1) == {("impossible", "engine")}
    assert trouble(45, 20, 30, 1) == {("tight", "learner")}


def test_shared_memory_smaller_than_the_store(seven: Callable[..., RunConfig]) -> None:
    assert "/dev/shm" in found(make_plan(seven(ONLINE), cluster=cluster(node(shm_bytes=GIB))), "object store")
    little = node(gpus=0.0, object_store_bytes=256 << 20, shm_bytes=64 << 20)
    assert unplaceable(load_config("demo"), cluster=cluster(little)) is None  # Ray then uses the disk


def test_a_node_without_the_run_directory() -> None:
    plan = make_plan(load_config("demo"), cluster=cluster(node("a", has_run_dir=True), node("b", has_run_dir=False)))
    assert "is not there on b" in found(plan, "run directory")


def test_host_memory_and_disk() -> None:
    config = load_config("demo")
    assert "host memory" in found(make_plan(config, cluster=cluster(node(memory_bytes=GIB))), "host memory")
    full = cluster(disk_free_bytes=1 << 20)
    assert "runs_dir" in found(make_plan(config, cluster=full), "disk")
    assert found(make_plan(config, cluster=full, used_bytes=GIB), "disk") == ""  # a resumed run has its room already


def test_a_colocated_engine_leaves_the_learner_its_states(seven: Callable[..., RunConfig]) -> None:
    config = seven(
        ONLINE, "learner.max_staleness=0", "learner.ranks=1", "rollout.actors=1", "learner.gpus_per_rank=0.5"
    )
    turns = {
        "placement": config.placement.model_copy(update={"colocate": True}),
        "rollout": config.rollout.model_copy(update={"gpus_per_actor": 0.5}),
    }
    assert "the learner keeps" in found(make_plan(config.model_copy(update=turns), cluster=cluster()), "colocation")


def test_a_model_that_is_not_there_is_left_to_its_stage() -> None:
    config = load_config("ppo_7b_8gpu", overrides=[ONLINE, "model.path=/nowhere/at/all"])
    assert "no such directory" in found(make_plan(config, cluster=cluster()), "model")
    assert unplaceable(config, cluster=cluster()) is None
    assert unplaceable(config, cluster=cluster(node(gpus=4.0))) is not None


def test_unknown_gpu_memory_warns_and_does_not_stop(seven: Callable[..., RunConfig]) -> None:
    plan = make_plan(seven(), cluster=cluster(node(gpu_bytes=None)))
    assert plan.impossible == ()
    assert any(one.area == "GPU memory" for one in plan.findings)


# ---------------------------------------------------------------- weights on their way


def test_weight_updates_by_transport(seven: Callable[..., RunConfig]) -> None:
    whole = make_plan(seven(ONLINE), cluster=cluster()).sync
    adapter = make_plan(seven(ONLINE, "learner.lora={rank: 16, broadcast: adapter}"), cluster=cluster()).sync
    assert whole is not None
    assert adapter is not None
    assert (whole.transport, whole.bytes_per_engine) == ("collective", 2 * 7_615_616_512)
    assert adapter.transport == "object_store"
    assert adapter.bytes_per_engine < whole.bytes_per_engine / 100
    apart = cluster(node("a", gpus=5.0), node("b", gpus=3.0))
    slow = make_plan(seven(ONLINE), cluster=apart, network_gbit_per_s=10.0).sync
    assert slow is not None
    assert slow.seconds == pytest.approx(2 * 7_615_616_512 / 1.25e9)


# ---------------------------------------------------------------- the gate


class Clock:
    """Time that passes only in `sleep`."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.wishes: list[int] = []

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def wait(self, config: RunConfig, views: list[ClusterView]) -> None:
        def view() -> ClusterView:
            return views.pop(0) if len(views) > 1 else views[0]

        wait_until_placeable(
            config, view=view, request=lambda bundles: self.wishes.append(len(bundles)), tick=lambda: None,
            clock=lambda: self.now_s, sleep=self.sleep,
        )  # fmt: skip


def test_a_growing_cluster_is_waited_for_and_asked_to_grow(seven: Callable[..., RunConfig]) -> None:
    clock = Clock()
    clock.wait(seven(ONLINE), [cluster(node(gpus=4.0)), cluster(node(gpus=4.0)), cluster()])
    assert clock.wishes == [8, 0]
    assert clock.now_s < 5


def test_a_cluster_that_does_not_grow_ends_in_the_table(seven: Callable[..., RunConfig]) -> None:
    clock = Clock()
    with pytest.raises(ConfigError, match="does not fit") as caught:
        clock.wait(seven(ONLINE), [cluster(node(gpus=4.0))])
    assert math.isclose(clock.now_s, 60.0, abs_tol=1.1)
    assert clock.wishes == [8, 0]
    assert "learner: GPU" in str(caught.value)


def test_a_cluster_that_fits_is_not_asked(seven: Callable[..., RunConfig]) -> None:
    clock = Clock()
    clock.wait(seven(ONLINE), [cluster()])
    assert (clock.wishes, clock.now_s) == ([], 0.0)


def test_a_refused_run_leaves_no_directory(tmp_path: Path) -> None:
    from keel.pipeline import run_pipeline

    config = load_config("demo", overrides=[f"runs_dir={tmp_path / 'runs'}", *HUGE_ENGINE])
    with pytest.raises(ConfigError, match="100 GPU"):
        run_pipeline(config, resume=False, fresh=False)
    assert not (tmp_path / "runs").exists()


def test_finished_stages_are_not_held_against_a_resumed_run(tmp_path: Path) -> None:
    config = load_config("demo", overrides=[f"runs_dir={tmp_path}", "sft.batch_size=100000000"])
    with pytest.raises(ConfigError, match="sft"):
        check_this_machine(config, resume=False)
    config.run_dir.mkdir()
    (config.run_dir / "stages.json").write_text(json.dumps({"data": 1.0, "sft": 2.0}))
    check_this_machine(config, resume=True)


def test_this_machine_can_run_the_demo() -> None:
    config = load_config("demo")
    require_placeable(config, cluster=ClusterView.of_this_machine(config))


# ---------------------------------------------------------------- views, output, command


def test_nvidia_smi_and_visible_devices() -> None:
    listing = "0, GPU-aaaa, 81559\n1, GPU-bbbb, 40960\nsomething went wrong\n"
    assert visible_gpus(listing, visible=None) == [81559 << 20, 40960 << 20]
    assert visible_gpus(listing, visible="1") == [40960 << 20]
    assert visible_gpus(listing, visible="GPU-aa") == [81559 << 20]
    assert visible_gpus(listing, visible="") == []


def test_nodes_as_ray_lists_them() -> None:
    class Ray:
        @staticmethod
        def nodes() -> list[dict[str, Any]]:
            has = {"CPU": 8.0, "GPU": 2.0, "accelerator_type:H100": 1.0, "memory": 50.0 * GIB,
                   "object_store_memory": 10.0 * GIB}  # fmt: skip
            gone = {"NodeID": "2", "NodeManagerAddress": "10.0.0.2", "Alive": False, "Resources": {}}
            return [{"NodeID": "1", "NodeManagerAddress": "10.0.0.1", "Alive": True, "Resources": has}, gone]

        @staticmethod
        def get_runtime_context() -> Any:
            return SimpleNamespace(get_node_id=lambda: "1")

    view = ClusterView.from_ray(Ray())
    assert view.nodes == (NodeView("10.0.0.1", 8.0, 2.0, 79 * GIB, 60 * GIB, 10 * GIB, None, None, driver=True),)
    assert view.joined


def test_text_and_data_say_the_same(seven: Callable[..., RunConfig]) -> None:
    plan = make_plan(seven("sft.epochs=1"), cluster=cluster())
    text, data = plan_text(plan), json.loads(json.dumps(plan_data(plan)))
    assert "does not fit" in text
    assert max(map(len, text.splitlines())) <= 118
    assert data["fits"] is False
    assert [role["name"] for role in data["roles"]] == ["sft", "rm", "learner", "rollout", "reward"]
    assert data["parameters"]["policy"] == 7_615_616_512


def test_the_commands_exit_code() -> None:
    fits = CliRunner().invoke(app, ["plan", "demo"])
    assert fits.exit_code == 0, fits.output
    refused = CliRunner().invoke(
        app, ["plan", "demo", "--json", *(part for one in HUGE_ENGINE for part in ("--set", one))]
    )
    assert refused.exit_code == 1
    assert json.loads(refused.output)["fits"] is False


def test_what_no_cluster_can_run(seven: Callable[..., RunConfig]) -> None:
    assert impossible_anywhere(seven()) == ()
    split = ("rollout.tensor_parallel_size=8", "rollout.gpus_per_actor=8")
    (finding,) = impossible_anywhere(seven(*split))
    assert "does not divide 28 attention heads" in finding.what
    assert impossible_anywhere(seven(*split, "stages=[data, sft, rm]")) == ()  # no engine
    assert impossible_anywhere(load_config("ppo_7b_8gpu", overrides=split)) == ()  # a model that is not here
    (finding,) = impossible_anywhere(load_config("demo", overrides=["rollout.kv_cache_gib=0.0001"]))
    assert "rollout.kv_cache_gib is 0.0001" in finding.what
