"""What a draft buys on HumanEval's problems, and whether each answer is the deployment's own.

    python benchmarks/draft_speed.py DEPLOYMENT --draft DRAFT -o FILE [--task humaneval|edit]
        [--problems 164] [--draft-tokens K] [--new-tokens 256] [--threads N]

Of each problem the answer is timed alone and with the draft, in turns, in two processes that stay
open. `edit` asks for the problem's solution again with its function renamed, which is what a lookup
is for. FILE gets a line a problem and is gone on with; the summary is printed from all its lines.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from owl_deploy.bench.machine import look
from owl_deploy.data.text import load_tokenizer
from owl_deploy.evaluate.humaneval import REQUEST, problems
from owl_deploy.inference import Deployment, EngineProcess, engine_for, open_deployment, threads_for
from owl_deploy.inference.draft import Draft, open_draft
from owl_deploy.models import digests

_EDIT = (
    "Repeat this Python program in full, with the function {entry_point} renamed to "
    "{entry_point}_v2. Answer with the program alone.\n```python\n{prompt}{canonical_solution}```"
)


def spread(count: int) -> list[dict[str, Any]]:
    """So many of the problems, from all over them: the first are the easiest."""
    every = problems()
    count = min(count, len(every))
    return [every[place * len(every) // count] for place in range(count)]


def prompt_of(
    tokenizer: Any,  # noqa: ANN401
    problem: dict[str, Any],
    task: str = "humaneval",
) -> list[int]:
    """The tokens that a model is asked with."""
    words = _EDIT.format(**problem)
    if task == "humaneval":
        words = REQUEST.replace("{{prompt}}", problem["prompt"])
    if tokenizer.chat_template is None:
        plain: list[int] = tokenizer.encode(problem["prompt"] if task == "humaneval" else words)
        return plain
    message = [{"role": "user", "content": words}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return tokens


def measured(
    alone: EngineProcess, drafted: EngineProcess, asked: dict[str, Any], swap: bool
) -> dict[str, Any]:
    """One problem's line: whether the answers are the same, and the seconds of both."""
    order = {"alone": alone, "draft": drafted}
    found = {
        name: order[name].request("answers", **asked, warm=False)
        for name in (sorted(order, reverse=True) if swap else order)
    }
    tokens = found["alone"]["tokens"][0]
    return {
        "same": tokens == found["draft"]["tokens"][0],
        "tokens": len(tokens),
        **{f"{name}_s": total_s(answer) for name, answer in found.items()},
        **{key: found["draft"]["draft"][key] for key in ("steps", "proposed", "accepted", "made")},
    }


def total_s(answer: dict[str, Any]) -> float:
    """The seconds that the tokens after the first took."""
    later = len(answer["tokens"][0]) - 1
    return float(later * sum(answer["token_ms"]) / 1e3)


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all problems together; each line has its own problem's counts.

    A step's tokens are those that the answers kept: the last one's may be more than were asked for.
    """
    timed = [line for line in lines if line["draft_s"] > 0]
    ratios = [math.log(line["alone_s"] / line["draft_s"]) for line in timed]
    counts = {key: sum(line[key] for line in lines) for key in ("steps", "proposed", "accepted")}
    later = sum(line["tokens"] - 1 for line in lines)  # the first is the prompt's
    return {
        "problems": len(lines),
        "same": sum(line["same"] for line in lines),
        "share_accepted": counts["accepted"] / max(1, counts["proposed"]),
        "tokens_per_step": later / max(1, counts["steps"]),
        "speed_up": math.exp(sum(ratios) / len(ratios)) if ratios else None,
    }


def _of(opened: Deployment, draft: Draft, chosen: argparse.Namespace) -> str:
    """What tells these answers and times from others'."""
    asked = {name: getattr(chosen, name) for name in ("task", "new_tokens", "context", "threads")}
    files = [
        digests.state_of(Path(one)) if Path(one).is_dir() else one
        for one in (opened.path, draft.place)
    ]
    return digests.of_json([files, draft.tokens, asked, look(0.1).cpu])[:12]


def main() -> None:
    """Measure what FILE does not have yet, and print the summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("deployment", type=Path)
    parser.add_argument("--draft", required=True)
    parser.add_argument("--draft-tokens", type=int)
    parser.add_argument("--task", choices=("humaneval", "edit"), default="humaneval")
    parser.add_argument("--problems", type=int, default=164)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--threads", type=int)
    parser.add_argument("-o", "--output", type=Path, required=True)
    chosen = parser.parse_args()
    opened = open_deployment(chosen.deployment)
    draft = open_draft(opened, chosen.draft, chosen.draft_tokens)
    asked = spread(chosen.problems)
    tokenizer = load_tokenizer(chosen.deployment)
    done = chosen.output.read_text().splitlines() if chosen.output.is_file() else []
    of = _of(opened, draft, chosen)
    if any(json.loads(line).get("of", of) != of for line in done):
        parser.error(f"{chosen.output} was made of other deployments, or with other options")
    known = {json.loads(line)["problem"] for line in done}
    how: dict[str, Any] = {"threads": threads_for(chosen.threads), "context": chosen.context}
    engine = engine_for(opened.target).name
    with (
        EngineProcess(engine, opened.path, **how) as alone,
        EngineProcess(
            engine, opened.path, draft=draft.place, draft_tokens=draft.tokens, **how
        ) as drafted,
        chosen.output.open("a", encoding="utf-8") as file,
    ):
        for number, problem in enumerate(asked):
            if problem["task_id"] in known:
                continue
            prompt = prompt_of(tokenizer, problem, chosen.task)
            request = {"prompts": [prompt], "count": chosen.new_tokens, "ends": opened.ends}
            line = measured(alone, drafted, request, swap=number % 2 == 1)
            file.write(json.dumps({"problem": problem["task_id"], "of": of, **line}) + "\n")
            file.flush()
    lines = [json.loads(line) for line in chosen.output.read_text().splitlines()]
    about = {"machine": look(0.1).cpu, "threads": how["threads"], "draft_tokens": draft.tokens}
    print(json.dumps({**about, **summary(lines)}, indent=2))


if __name__ == "__main__":
    main()
