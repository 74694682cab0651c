"""The command line. Imports nothing heavy: a verb's own modules load when it runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster.errors import ConfigError, KeelError
from keel.cli_data import advise, data_app
from keel.submission.options import SubmitOptions, command_from

app = typer.Typer(
    name="keel",
    help="Online reinforcement learning from human feedback that scales out and does not capsize.\n\n"
    "Try it on a laptop with no GPU: keel train demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigArgument = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A YAML file, or a preset's name (see `keel presets`).")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override one key: --set learner.kl.target_nats_per_sequence=6. Repeatable."
    ),
]


@app.command()
def train(
    config: ConfigArgument,
    overrides: SetOption = None,
    stages: Annotated[str | None, typer.Option(help="Only these stages, comma-separated, e.g. ppo,evaluate.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run of this name stopped.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over; an earlier run of this name is moved aside.")
    ] = False,
    redis: Annotated[
        str | None,
        typer.Option(envvar="KEEL_REDIS_URL", help="URL of the queue server, instead of redis.url; best by variable."),
    ] = None,
) -> None:
    """Run the whole job, or the stages asked for: data, sft, collect, rm, ppo, dpo, evaluate, report.

    All but dpo are run when none are named.

    Everything goes to runs/NAME/. Ctrl-C saves a checkpoint and stops all that was started; twice stops at once.
    """
    from configs.load import load_config

    chosen = list(overrides or [])
    if stages is not None:
        chosen.append(f"stages=[{stages}]")
    if redis is not None:
        chosen.append(f"redis.url={json.dumps(redis)}")
    run_config = load_config(config, overrides=chosen)
    if resume and fresh:
        raise ConfigError("--resume and --fresh exclude each other", do="give one of them")
    from keel.ray_environment import prepare_ray_environment

    prepare_ray_environment()
    from keel.pipeline import run_pipeline

    raise typer.Exit(run_pipeline(run_config, resume=resume, fresh=fresh))


def _only(stage: str, config: str, overrides: list[str] | None) -> None:
    wanted = {"sft": "data,sft", "rm": "data,sft,collect,rm", "dpo": "data,sft,collect,dpo,evaluate,report"}[stage]
    train(config, overrides=overrides, stages=wanted, resume=True, fresh=False)


@app.command()
def sft(config: ConfigArgument, overrides: SetOption = None) -> None:
    """Run up to supervised fine-tuning: stages data and sft. `keel train --resume` goes on from there."""
    _only("sft", config, overrides)


@app.command()
def rm(config: ConfigArgument, overrides: SetOption = None) -> None:
    """Run up to the reward model: stages data, sft, collect and rm. `keel train --resume` goes on from there."""
    _only("rm", config, overrides)


@app.command()
def dpo(config: ConfigArgument, overrides: SetOption = None) -> None:
    """SFT, then direct preference optimisation in place of a reward model and PPO; evaluated at the end.

    DPO after PPO: keel train CONFIG --stages data,sft,collect,rm,ppo,dpo,evaluate,report
    """
    _only("dpo", config, overrides)


@app.command()
def config(config: ConfigArgument, overrides: SetOption = None) -> None:
    """Check a configuration and print it with every default filled in."""
    from configs.load import dump_config, load_config

    typer.echo(dump_config(load_config(config, overrides=overrides or [])), nl=False)


@app.command()
def plan(
    config: ConfigArgument,
    overrides: SetOption = None,
    address: Annotated[
        str | None, typer.Option(help="A Ray cluster to plan for, instead of ray.address; its resources are only read.")
    ] = None,
    network_gbit: Annotated[float, typer.Option(min=0.1, help="Bandwidth between nodes, Gbit/s.")] = 25.0,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Print what goes where, what it costs in memory, and what is impossible. Starts nothing; exits 1 if not."""
    from configs.load import load_config
    from keel.planning.command import print_plan_of

    run_config = load_config(config, overrides=overrides or [])
    fits = print_plan_of(run_config, address=address, network_gbit_per_s=network_gbit, as_json=as_json)
    raise typer.Exit(0 if fits else 1)


@app.command()
def presets() -> None:
    """List the configurations that ship with Keel."""
    from configs.load import preset_names

    for name in preset_names():
        typer.echo(name)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="A run's directory, e.g. runs/demo; it may still be running.")],
) -> None:
    """Write report.html for a run, finished or not, and its diagnosis anew."""
    from keel.diagnose.command import write_diagnosis_of
    from keel.report import write_report

    run = _existing_run(run_dir)
    write_diagnosis_of(run)
    typer.echo(write_report(run))


@app.command()
def diagnose(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory; it may still be running.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print diagnosis.json.")] = False,
) -> None:
    """Say what happened in a run, why, and what to change; writes diagnosis.md and .json. See docs/diagnosis.md."""
    from keel.diagnose.command import diagnose as diagnose_run

    diagnose_run(run_dir, as_json_text=as_json)


@app.command()
def top(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run's directory, e.g. runs/demo; it may not be there yet.")
    ],
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end, as without a terminal.")] = False,
) -> None:
    """Watch a run live, from its files alone: state, guard, curves, queues, events. Ctrl-C leaves the run alone."""
    from keel.top import top as show

    show(run, once=once)


@app.command("eval")
def evaluate(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory; it may still be running.")],
    prompts: Annotated[int | None, typer.Option(min=1, help="How many held-out prompts; else all there are.")] = None,
    judge: Annotated[
        str | None, typer.Option(metavar="MODULE:FUNCTION", help="Who compares answers; else the run's judge.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="final, best or a directory; else final, or the best up to now.")
    ] = None,
) -> None:
    """Compare a policy with the one before training on held-out prompts: win rate, gold, reward, KL, what it forgot."""
    from keel.eval_command import evaluate_now

    evaluate_now(_existing_run(run_dir), prompts=prompts, judge=judge, policy=policy)


@app.command()
def card(
    run_dir: Annotated[Path, typer.Argument(help="A run's directory, e.g. runs/demo; it may still be running.")],
    version: Annotated[str | None, typer.Option(help="A version, or how it begins; else the one that scores.")] = None,
) -> None:
    """Show the validation card of a reward model: how far it can be trusted, and what fools it."""
    from keel.card_command import show_card

    show_card(_existing_run(run_dir), version=version)


@app.command()
def rules(
    constitution: Annotated[Path, typer.Argument(metavar="CONSTITUTION", help="A YAML file; see docs/rewards.md.")],
    tries: Annotated[
        list[str] | None, typer.Option("--try", metavar="ANSWER", help="An answer to try them on. Repeatable.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="The prompt of these, for rules that look at it.")] = "",
    file: Annotated[
        Path | None,
        typer.Option(help="Answers, JSON Lines or Parquet: answer; or prompt, chosen, rejected; or samples.jsonl."),
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="How many of the file's answers that are hit are shown.")] = 10,
) -> None:
    """Try a constitution's rules on answers: which are hit, what that does to rewards, on what share of a file."""
    from keel.rules_command import try_rules

    try_rules(constitution, answers=tries or (), prompt=prompt, file=file, show=show, say=typer.echo)


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="A policy directory, e.g. runs/demo/policy/final.")],
    prompts: Annotated[list[str], typer.Argument(help="Prompts, answered one by one.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 answers greedily.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    best_of: Annotated[
        int, typer.Option(min=1, help="Sample so many answers and show the one that the reward model likes best.")
    ] = 1,
    rm: Annotated[
        Path | None, typer.Option(help="Reward model for --best-of, e.g. runs/demo/rm. Left out: that of MODEL's run.")
    ] = None,
    show_all: Annotated[bool, typer.Option("--show-all", help="With --best-of: all answers and rewards.")] = False,
) -> None:
    """Answer prompts with a trained policy (transformers, on this machine).

    The best of n answers is at most log n − (n − 1)/n nats from the policy: 1.2 for 8, at 8 times the cost.
    """
    if best_of > 1:
        from keel.best_of import best_of as choose

        chosen = choose(
            model, prompts, n=best_of, rm=rm, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
        )
        for prompt, answers in chosen:
            typer.echo(prompt)
            for number, scored in enumerate(answers if show_all else answers[:1]):
                typer.echo(f"  {'→' if number == 0 else ' '} {scored.reward:+.3f}  {scored.answer}")
        return
    from keel.generate import answer_prompts

    for prompt, answer in answer_prompts(
        model, prompts, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
    ):
        typer.echo(f"{prompt}\n  → {answer}")


@app.command()
def scale(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run that goes on, e.g. runs/demo.")],
    actors: Annotated[int | None, typer.Option(help="How many rollout actors there should be.")] = None,
    auto: Annotated[bool, typer.Option("--auto", help="Hand the number back to rollout.autoscale.")] = False,
    redis: Annotated[
        str | None, typer.Option(envvar="KEEL_REDIS_URL", help="URL of the run's Redis, where it is not on disk.")
    ] = None,
) -> None:
    """Add or remove rollout actors while a run goes on. Removed ones finish what they have; nothing is lost.

    The number holds until the end of the run, and autoscaling pauses; a resumed run starts with rollout.actors again.
    """
    from keel.online.scale import scale_run

    if auto == (actors is not None):
        raise ConfigError("one of --actors and --auto is needed", do="keel scale runs/demo --actors 4")
    scale_run(run, actors=actors, redis_url=redis, say=typer.echo)


@app.command()
def review(
    run_dir: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="A run that goes on.")] = None,
    pairs: Annotated[
        Path | None, typer.Option(help="Without a run: pairs to compare, prompt, answer_a and answer_b a line.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8642,
    token_file: Annotated[
        Path | None, typer.Option(help="Holds the login token; else KEEL_REVIEW_TOKEN, else a random one is printed.")
    ] = None,
    redis: Annotated[
        str | None, typer.Option(envvar="KEEL_REDIS_URL", help="URL of the run's Redis, where it is not on disk.")
    ] = None,
) -> None:
    """Serve the web page on which people compare answers and look at flagged ones. Ctrl-C ends it; docs/review.md."""
    from keel.review_command import PageAddress
    from keel.review_command import review as serve

    serve(run_dir, pairs=pairs, redis_url=redis, address=PageAddress(host, port, token_file), say=typer.echo)


@app.command("reward-worker")
def reward_worker(
    redis: Annotated[
        str, typer.Option(envvar="KEEL_REDIS_URL", help="redis:// or rediss:// URL, with user and password.")
    ],
    run: Annotated[Path, typer.Option(help="The run's directory (shared storage), with rm/ and sft/model.")],
    index: Annotated[int, typer.Option(help="Number of this worker; must differ between workers of a run.")] = 1000,
) -> None:
    """Score rollouts of a run from outside Ray: start as many as you like, anywhere that reaches Redis."""
    from keel.standalone import run_reward_worker

    raise typer.Exit(run_reward_worker(_existing_run(run), redis_url=redis, index=index))


def _submit(options: SubmitOptions) -> None:
    """Run the job on a Ray cluster that is up: upload, start, follow its log, and exit as it does.

    Ctrl-C leaves the job running. --status, --logs and --stop are about a job submitted earlier.
    """
    from keel.submission.submit import submit

    raise typer.Exit(submit(options))


app.add_typer(data_app, name="data")
app.command()(advise)
app.command("submit")(command_from(SubmitOptions, _submit))


def _existing_run(path: Path) -> Path:
    if not (path / "config.yaml").is_file():
        raise ConfigError(
            "not a run directory", got=str(path), do="give a directory that `keel train` made, e.g. runs/demo"
        )
    return path


def main() -> None:
    """Entry point of the `keel` command: one clear message and exit code 2 for every error that Keel foresees."""
    try:
        app()
    except KeelError as error:
        typer.secho(f"keel: {type(error).__name__}: {error}", err=True, fg=typer.colors.RED)
        sys.exit(2)


if __name__ == "__main__":
    main()
