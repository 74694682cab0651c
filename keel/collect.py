"""The collect stage: pairs of answers sampled from the SFT policy by the rollout actors, labelled by the judge."""

from __future__ import annotations

import itertools

from cluster.data_records import PREFERENCES_FILE, UNCLEAR_FILE, data_dir, record_table, write_rows
from cluster.errors import ConfigError, DataError
from cluster.plugin import resolve
from keel.roles import Roles
from keel.runtime import Runtime
from keel.sampling import Answer, Question, answer_all, load_questions
from reward_service.preferences import Candidate, collect_pairs

_MIN_PAIRS = 20


def collect_preferences(runtime: Runtime, roles: Roles) -> None:
    """Write data/preferences.jsonl and its counts. Answer pairs take the configured temperatures in turn.

    Raises ConfigError without a judge, DataError when too few pairs got a clear label.
    """
    config, run = runtime.config, runtime.run
    if config.collect.judge is None:
        raise ConfigError("nobody judges the preference pairs", do="set collect.judge, or give data.preferences")
    judge = resolve(config.collect.judge, key="collect.judge")
    pool = roles.rollout(run.path / "sft" / "model")
    pool.wait_ready(runtime.tick)
    questions = load_questions(config, run.path, table="prompts")
    asked = list(itertools.islice(itertools.cycle(questions), config.collect.pairs))
    candidates: list[Candidate] = []
    temperatures = config.collect.temperatures
    for number, temperature in enumerate(temperatures):
        share = asked[number :: len(temperatures)]
        twice = [question for question in share for _ in range(2)]
        answers = answer_all(runtime, pool, twice, stage="collect", temperature=temperature)
        candidates += _candidates(share, answers)
    collected = collect_pairs(candidates, judge=judge, seed=config.seed, policy_version=0, source="collected")
    if len(collected.pairs) < _MIN_PAIRS:
        raise DataError(
            "too few preference pairs with a clear label",
            got=f"{len(collected.pairs)} of {len(candidates)}: {collected.report.rejected}",
            do="raise collect.pairs, or look at the judge",
        )
    write_rows(data_dir(run.path) / PREFERENCES_FILE, collected.pairs)
    write_rows(data_dir(run.path) / UNCLEAR_FILE, collected.unclear)
    record_table(run.path, "preferences", collected.report)


def _candidates(questions: list[Question], answers: list[Answer]) -> list[Candidate]:
    return [
        Candidate(question.record.prompt, first.text, second.text)
        for question, first, second in zip(questions, answers[::2], answers[1::2], strict=True)
    ]
