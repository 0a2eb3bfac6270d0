"""
How well a policy answers, in which mode, with which simulator; and how true the simulator is.

  python evaluate.py --bench rooms                                held-out rooms: direct, forced and agentic, one table
  python evaluate.py --bench rooms --mode agentic --simulator tuned untuned truth
  python evaluate.py --bench mindcube --data path/to/data         MindCube (extras/benches/mindcube.py says what to fetch)
  python evaluate.py --bench wm                                   the simulator itself: is the view the commanded one?
  python evaluate.py --bench wm --data out/heldout                the same in scans (extras/report/real_views.py)
  torchrun --standalone --nproc_per_node 8 evaluate.py …          the same numbers; every process asks its part

World2VLM's questions are asked by `python -m extras.world2vlm.evaluate`.

In: the newest policy and simulator of out/ and out/demo/, the newer of out/data and out/demo/data.
Out, in out/eval/<bench>/: results.json; report.html, every question as a dialogue; workflow.png, the modes side by side
per category (the paper's Figure 3); predictions.jsonl, from which a killed run continues, and views/, what was imagined
(lib/answers.py). Of --bench wm: results.json, report.html, views/, dose.png (commanded against recovered motion).

Modes: direct has no tool; forced must imagine before it answers; agentic is free to. All three are asked in our words
(but for MMSI-Video-Bench, whose own are complete), and a dialogue whose answer the protocol never accepted is wrong.
official is direct in the words of MindCube (raw_qa), MMSI-Bench, SAT or VSI-Bench, which want a bare answer: a letter,
of MindCube a letter and its words, of SAT an option's words alone. Published numbers stand beside that one, the gain of
imagining beside direct. search and gate are baselines of a served policy that need no training (extras/report/search.py):
a beam search over imagined views, a vote on whether to imagine. Decoding is greedy. A question whose images cannot be
read is counted as wrong and reported, and asked again by the next run; a duplicate id is asked again and reported:
nothing leaves the denominator but a question without a gold answer. Beside the accuracy stands what a question took:
views, turns of the policy, tokens, seconds. lib/scores.py makes the numbers, extras/report/diagnosis.py says in rooms
why an answer is right or wrong.
"""

import argparse
import gc
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from lib import answers
from lib.answers import (
    Prediction,
    imagine_targets,
    load_triples,
    trivial_views,
    true_renders,
    with_keys,
)
from lib.consistency import compare
from lib.dialogue import Trajectory
from lib.distributed import World, fail, is_main, say, setup, wait_for_all
from lib.images import PictureError, check_shape, read
from lib.records import Question, load_jsonl, readable, write_json
from lib.scores import (
    TOOLLESS,
    chance,
    cost_of,
    print_answers,
    print_consistency,
    summarise,
)
from lib.simulators import (
    SIMULATORS,
    URLS,
    SimulatorError,
    find_weights,
    is_world_model,
    load_simulator,
    needs_room,
)
from lib.stage import bounded, has_extras, lock_folder, need, newest, run_stage
from lib.streams import stable_hash
from policy import Policy, newest_policy, rollout
from rewards import exact_match, name_gold, option_letter
from world_model import add_sampler_flags, sampler_options

BENCHES = ("rooms", "mindcube", "mmsi", "mmsi_video", "sat", "vsi")
OWN_WORDS = ("mindcube", "mmsi", "sat", "vsi")  # benches with mode official
MODES = ("direct", "forced", "agentic")
BASELINES = ("search", "gate")  # of extras/report/search.py
# of a question row
ASKED_KEYS = ("id", "bench", "images", "question", "answer", "category", "kind", "needs_view")
COUNT = bounded(int, 1)
NO_REPORT = "No report, no pictures, no diagnosis: extras/, which makes them, is not here."
COPIED = (  # of a dialogue
    "well_formed",
    "valid_calls",
    "invalid_calls",
    "unreadable",
    "truncated",
    "turns",
    "replies",
)


class Condition(NamedTuple):
    """One column of the table: a mode with a simulator, and all that its predictions depend on."""

    mode: str
    simulator_name: str
    settings: dict  # "version" and what follows it in answers.Prediction


# ---- the bench ------------------------------------------------------------------------------------------------------


class Rooms:
    """What this file asks of a bench. The published ones have the same methods: extras/benches/common.py."""

    def load(self, args: argparse.Namespace) -> list[dict]:
        """The questions; sets args.data."""
        folder = Path(args.data or default_data("questions"))
        args.data = str(folder)
        test = load_jsonl(folder / "questions_test.jsonl", Question, name_gold, ASKED_KEYS)
        if any("mined" in question for question in test):
            fail(
                f"{folder}/questions_test.jsonl holds mined questions: they were chosen by what a model gets wrong "
                f"and are for training only."
            )
        return test

    def images(self, question: dict) -> list[np.ndarray]:
        """Its images, (H, W, 3) uint8 each. Raises PictureError if one is missing or broken."""
        images = question["images"]
        return [image if isinstance(image, np.ndarray) else read(image) for image in images]

    def prompt(self, question: dict, mode: str) -> list[str] | None:
        """The bench's own words around its images; None: it is asked in the policy's own (lib/dialogue.py)."""
        return None

    def groups(self, question: dict) -> list[str]:
        """Which rows of the table a question counts in: its family, split by whether a view is needed."""
        part = {True: ", view needed", False: ", view given", None: ""}[question["needs_view"]]
        return [question["category"] + part]

    def judge(self, question: dict, dialogue: Trajectory, mode: str) -> dict:
        """-> {"answer": what was read, "correct", "lenient": by a forgiving rule}."""
        text, options = dialogue.answer, question.get("options")
        answer = option_letter(text or "", options) if options else text
        correct = exact_match(text, question)
        return {"answer": answer, "correct": correct, "lenient": correct}

    def diagnose(self, question: dict, dialogue: Trajectory) -> dict | None:
        """Why an answer is right or wrong."""
        if not has_extras():
            return None
        from extras.report import diagnosis

        return diagnosis.diagnose(question, dialogue)


def open_bench(name: str):
    """`Rooms`, or a published bench."""
    if name == "rooms":
        return Rooms()
    from extras.benches.common import Published

    return Published(name)


# ---- asking ---------------------------------------------------------------------------------------------------------


def ask_missing(
    policy, bench, questions: list[dict], condition: Condition, simulator, args, world: World
) -> None:
    """Ask this process's part of what has no answer for good yet; every batch goes to predictions.jsonl at once.

    Raises SimulatorError if a server stops.

    bench       `Rooms`, or what has its methods;  simulator: anything with imagine(queries), or None
    args        with `out`, the folder, and `batch`, dialogues at once: memory and speed only
    """
    out = Path(args.out)
    rows = answers.load_predictions(out, condition.settings, questions)
    final = {key for key, row in rows.items() if not answers.failure(row)}
    if hasattr(policy, "endpoint"):  # a server may give one mode and refuse the tools of another
        policy.endpoint.served = bool(final)
    source = f"{condition.settings['policy']} with {condition.simulator_name}"
    if final and any(url in source for url in URLS):
        say(
            f"Old answers of {source} in {out} count again, whatever serves there now; to ask anew, give "
            f"another --out."
        )
    own = with_keys(questions)[world.rank :: world.size]
    own = [pair for pair in own if pair[0] not in final]
    title = f"{condition.mode}, {condition.simulator_name}"
    silent = not own or not is_main()
    for start in tqdm(range(0, len(own), args.batch), title, unit="batch", disable=silent):
        pairs = own[start : start + args.batch]
        predictions, outage = ask_batch(policy, bench, pairs, condition, simulator, args)
        answers.append_predictions(out, predictions)
        if outage:
            raise outage


def ask_batch(
    policy, bench, pairs: list[tuple], condition: Condition, simulator, args
) -> tuple[list[Prediction], SimulatorError | None]:
    """Ask some questions once, greedily -> what was answered, and the error by which a server stopped, or None.

    pairs   of `with_keys`;  the others as in `ask_missing`
    A question that a stopped server did not answer is left to the next run.
    """
    start = time.time()
    outcomes, prompts = {}, {}  # by key: the dialogue, or why there is none; what is asked
    for key, question in pairs:
        try:
            images = bench.images(question)
            for number, image in enumerate(images, 1):
                check_shape(image, f"Image-{number}")
        except PictureError as error:
            outcomes[key] = SimulatorError(f"image: {error}")
            continue
        words = bench.prompt(question, condition.mode)
        prompts[key] = {**question, "images": images, "prompt": words}
    outage = None
    if prompts:
        asked = list(prompts.values())
        dialogues, outage = hold_dialogues(policy, asked, condition, simulator, args.batch)
        outcomes |= zip(prompts, dialogues, strict=True)
    seconds = round((time.time() - start) / len(pairs), 4)
    predictions = []
    for key, question in pairs:
        outcome = outcomes[key]
        if isinstance(outcome, SimulatorError) and outcome.down:
            continue
        row = prediction_of(bench, key, question, outcome, condition, seconds, Path(args.out))
        predictions.append(row)
    return predictions, outage


def hold_dialogues(
    policy, questions: list[dict], condition: Condition, simulator, batch: int
) -> tuple[list, SimulatorError | None]:
    """-> a Trajectory per question, of a served policy or simulator also a SimulatorError; and what stopped it, or None."""
    mode = "direct" if condition.mode in TOOLLESS else condition.mode
    seed = condition.settings["seed"]
    limit = condition.settings["max_new_tokens"]
    if not hasattr(policy, "endpoint"):
        options = {"temperature": 0, "seed": seed, "rows": batch, "max_new_tokens": limit}
        return rollout(policy, questions, simulator, mode, **options), None
    from extras.report.search import hold_served_dialogues

    return hold_served_dialogues(policy, questions, simulator, mode, seed)


def prediction_of(
    bench, key: str, question: dict, outcome, condition: Condition, seconds: float, out: Path
) -> Prediction:
    """One line of predictions.jsonl; a question that could not be asked is a wrong answer.

    outcome   its Trajectory, or the SimulatorError that stands in its place;  out: where its views are saved
    """
    has_dialogue = isinstance(outcome, Trajectory)
    dialogue = outcome if has_dialogue else Trajectory(question, condition.mode)
    calls = [call for call in dialogue.provenance if call]
    views = dialogue.images[len(dialogue.images) - len(calls) :]
    scene = question.get("scene") or {}
    return {
        "key": key,
        "digest": answers.digest(question),
        **{name: question[name] for name in ("bench", "kind", "category")},
        "groups": bench.groups(question),
        "needs_view": question.get("needs_view"),
        "scene": scene.get("room", question.get("cluster", key)),
        "gold": question["answer"],
        **condition.settings,
        "simulator": condition.simulator_name,
        "said": dialogue.answer,
        **{name: getattr(dialogue, name) for name in COPIED},
        "calls": calls,
        "views": answers.save_views(out, views),
        "seconds": seconds,
        "cost": cost_of(dialogue),
        **bench.judge(question, dialogue, condition.mode),
        "error": None if has_dialogue else str(outcome),
        "missing_images": question.get("missing_images", 0),
        "diagnosis": bench.diagnose(question, dialogue) if has_dialogue else None,
    }


# ---- the results ----------------------------------------------------------------------------------------------------


def conclude(args, policy_name: str, questions: list[dict], records: dict) -> dict:
    """Print the table -> what results.json holds.   records   {(mode, simulator's name): {key: prediction}}"""
    rows = {pair: list(predictions.values()) for pair, predictions in records.items()}
    direct = rows.get(("direct", "none"))
    truth = rows.get(("forced", "truth"))
    modes, simulators, summaries = {}, {}, {}
    for (mode, name), predictions in rows.items():
        summary = summarise(predictions, None if mode == "direct" else direct, truth)
        summaries[mode, name] = summary
        modes.setdefault(mode, summary)  # that of the first simulator
        simulators.setdefault(name, {})[mode] = summary
    guessing = chance(questions)
    print_answers(summaries, guessing)
    results = {
        "bench": args.bench,
        "policy": policy_name,
        "sampler": args.sampler,
        "n": len(questions),
    }
    return results | {"chance": guessing, "modes": modes, "simulators": simulators}


# ---- the simulator itself -------------------------------------------------------------------------------------------


def measure_simulators(args: argparse.Namespace, world: World) -> None:
    """--bench wm: every process imagines its part, the first one measures."""
    out = Path(args.out)
    folder = Path(args.data or default_data("triples"))
    rows = load_triples(folder / "triples_test.jsonl", args.limit)
    if not rows:
        fail(
            f"{folder}/triples_test.jsonl holds no triples. Of a few scans none may fall to test: list some, "
            f"`python data.py triples --dataset NAME --root DIR --test FILE`."
        )
    scans = "room" not in rows[0]
    doses, tools = [], None
    if scans:
        from extras.report import scan_views

        policy = open_policy(args, world.device)[0] if args.policy_url else None
        if is_main():
            tools = scan_views.instruments(args, rows, policy, world.device)  # before the work
    elif has_extras():
        from extras.report.doses import dose_rows, measure_chains, measure_doses

        doses = dose_rows(rows, args.dose_rooms)
    folders = {}
    for name in args.simulator:
        if name != "none":
            key = stable_hash(fingerprint(name, args.wm, args.sampler))
            folders[name] = out / "views" / f"{key:016x}"
            own = [*rows, *doses][world.rank :: world.size]
            imagine_part(args, name, own, folders[name], world.device)
            gc.collect()  # a simulator is in a cycle, and two at once may not fit
    wait_for_all()  # all views are in their folders
    if not is_main():
        return
    views = {}
    for name, views_folder in folders.items():
        views[name] = imagine_targets(None, rows, views_folder, title=f"{name}, look")
    if scans:
        results = scan_views.measure_scans(args, rows, views, tools)
    else:
        oracles = {"true render": true_renders(rows)}
        if has_extras():
            from extras.reprojection import warped_views

            oracles["warp with true depth and pose"] = warped_views(rows)
        baselines = trivial_views(rows)
        results = compare(rows, {"simulators": views, "baselines": baselines, "oracles": oracles})
    print_consistency(results)
    results |= {"dose": {}, "chains": {}}
    if has_extras() and not scans:
        results["dose"] = measure_doses(doses, folders)
        results["chains"] = measure_chains(rows, folders)
    first = next(iter(results["simulators"].values()), {})
    results |= {"bench": "wm", "n": len(rows), "sampler": args.sampler}
    results = readable(first | results)  # JSON has no nan
    write_json(out / "results.json", results)
    names = ["results.json"]
    if has_extras():
        from extras.report import pages

        names += pages.write_simulators(out, results, rows, views)
    else:
        say(NO_REPORT)
    say(f"\n{len(rows)} triples; " + ", ".join(f"{out}/{name}" for name in names))


def imagine_part(args, name: str, rows: list[dict], folder: Path, device: torch.device) -> None:
    """The views of one simulator for these rows, into its folder; it is gone from memory afterwards."""
    if name.startswith(URLS) and folder.exists():
        say(f"Views of {name} that lie in {folder} are not imagined again; remove it to ask anew.")
    simulator = load_simulator(name, device, args.wm, **args.sampler)
    imagine_targets(simulator, rows, folder, args.batch or 64, name)
    if has_extras():
        from extras.report.doses import chained_rows

        imagine_targets(simulator, chained_rows(simulator, rows, folder), folder)


# ---- the questions, the policy and the conditions -------------------------------------------------------------------


def default_data(what: str) -> Path:
    """The newer folder of out/data and out/demo/data with a file of "triples" or "questions" to test on."""
    file = f"{what}_test.jsonl"
    folder = newest(("data",), file)
    return folder or need(Path("out/data") / file, f"python data.py {what}").parent


def fingerprint(name: str, wm: str | None = None, options: dict | None = None) -> str:
    """What tells one simulator (or policy folder) from another, or from the same folder trained or configured anew.

    options   of `sampler_options`: they change what a world model draws
    """
    folder = find_weights(name, wm) or name
    files = [*Path(folder).glob("*.safetensors"), *Path(folder).glob("*.json")]
    newest_change = max((int(file.stat().st_mtime) for file in files), default=0)
    changed = f" {options}" if options and is_world_model(name) else ""
    return f"{folder}@{newest_change}{changed}"


def worth_asking(args: argparse.Namespace, questions: list[dict]) -> None:
    """Stop with a sentence where there would be nothing to count, nothing to look at, or no room to render."""
    if not any(question["answer"] is not None for question in questions):
        fail(
            f"None of the {len(questions)} questions of --bench {args.bench} has a gold answer that counts: "
            f"there is nothing to measure. Give the published file with --data, or a larger --limit."
        )
    images = [str(image) for question in questions for image in question["images"]]
    # a frame of a video is called video.mp4#3/32
    if not any(Path(image.partition("#")[0]).exists() for image in images):
        example = f" (the first would be {images[0]})" if images else ""
        fail(
            f"Not one image of the {len(questions)} questions of --bench {args.bench} is there{example}. Unpack "
            f"the images beside the questions, or give the folder that holds both with --data."
        )
    in_rooms = any(map(needs_room, args.simulator))
    if in_rooms and not all(question.get("scene") for question in questions):
        fail(
            f"--simulator {' '.join(args.simulator)} works in rooms only: --bench {args.bench} has no depth."
        )


def open_policy(args: argparse.Namespace, device: torch.device) -> tuple:
    """-> (the policy, what it is called in the results); sets the flags whose defaults depend on it."""
    if args.policy_url:
        from extras.remote.client import RemotePolicy

        args.batch = args.batch or 8
        limits = {"max_new_tokens": args.max_new_tokens, "at_once": args.batch}
        try:
            policy = RemotePolicy(args.policy_url, args.model, **limits)
        except ValueError as error:
            fail(f"--policy-url: {error}")
        name = f"{args.model} at {args.policy_url}"
    else:
        name = args.policy or newest_policy()
        policy = Policy.load(name, device)
        # 64 dialogues of an 8B policy take some 100 GB
        args.batch = args.batch or (64 if policy.is_tiny else 8)
    args.max_new_tokens = args.max_new_tokens or policy.turn_limit
    return policy, str(name)


def conditions_of(args: argparse.Namespace, policy_name: str) -> list[Condition]:
    """The columns of the table, mode by mode."""
    modes = (args.mode,)
    if args.mode == "all":
        modes = (*MODES, "official") if args.bench in OWN_WORDS else MODES
    conditions = []
    for mode in modes:
        has_tool = mode not in TOOLLESS
        for name in args.simulator if has_tool else ("none",):
            settings = {
                "version": answers.VERSION,
                "policy": fingerprint(policy_name),
                "seed": args.seed,
                "max_new_tokens": args.max_new_tokens,
                "frames": args.frames,
                "mode": mode,
                "weights": fingerprint(name, args.wm, args.sampler) if has_tool else "none",
            }
            conditions.append(Condition(mode, name, settings))
    return conditions


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's flags."""
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    own_words = ", ".join(OWN_WORDS)
    p.add_argument("--bench", choices=(*BENCHES, "wm"), default="rooms")
    p.add_argument(
        "--mode",
        choices=(*MODES, "official", *BASELINES, "all"),
        default="all",
        help=f"all (default): {', '.join(MODES)}, for {own_words} also official; search, gate: the baselines",
    )
    add_model_flags(p)
    add_sampler_flags(p)
    add_run_flags(p)
    args = p.parse_args(argv)
    args.sampler = sampler_options(args)
    twin = ["untuned"] if args.bench == "wm" and newest(("wm-untuned",)) else []
    args.simulator = args.simulator or ["tuned", *twin]
    args.out = args.out or f"out/eval/{args.bench}"
    if bool(args.policy_url) != bool(args.model) or (args.policy_url and args.policy):
        p.error("--policy-url and --model go together, and without --policy")
    if args.mode == "official" and args.bench not in OWN_WORDS:
        p.error(f"--mode official is of {own_words}: --bench {args.bench} is asked in one way only")
    return args


def add_model_flags(p: argparse.ArgumentParser) -> None:
    """Who answers, and who imagines."""
    p.add_argument(
        "--policy",
        help="folder or hub id (default: the newest of phase2, phase1, sft in out/, out/demo/)",
    )
    p.add_argument(
        "--policy-url",
        help="instead: an OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1; its key, if it needs one, is "
        "read from OPENAI_API_KEY",
    )
    p.add_argument("--model", help="--policy-url: the model's name there")
    p.add_argument(
        "--max-new-tokens",
        type=COUNT,
        help="per turn of the policy (default: 4096, of a tiny policy 256; of --policy-url hidden reasoning counts too)",
    )
    p.add_argument(
        "--simulator",
        nargs="+",
        help=f"one or more of {', '.join(SIMULATORS)}, or the folder or hub id of a world model "
        "(default: tuned; for --bench wm also untuned, if it has been trained)",
    )
    p.add_argument(
        "--wm",
        help="folder or hub id of the tuned simulator (default: the newest of out/wm, out/wm-astra, out/demo/wm)",
    )
    p.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the simulator's noise (decoding is greedy; --bench wm: each view has noise of its own, whatever the "
        "seed)",
    )


def add_run_flags(p: argparse.ArgumentParser) -> None:
    """What is asked, what measures, and where the answers go."""
    p.add_argument(
        "--data",
        help="rooms, wm: folder of questions_test.jsonl, triples_test.jsonl (default: the newer of out/data and "
        "out/demo/data); others: the published files (default: data/<bench>, fetched if it is not there)",
    )
    p.add_argument("--limit", type=COUNT, help="only the first N questions or triples")
    p.add_argument(
        "--frames",
        type=COUNT,
        help="video benches: frames of a question (mmsi_video: 50 is Uniform-50, 300 Sufficient-Coverage; default 50; "
        "vsi: 32)",
    )
    p.add_argument(
        "--dose-rooms",
        type=bounded(int, 0),
        default=24,
        help="wm: rooms for commanded against recovered motion",
    )
    p.add_argument("--matcher", help="wm in scans: folder or hub id of a keypoint matcher")
    p.add_argument(
        "--detector",
        help="wm in scans: folder or hub id of a GroundingDINO; it looks for what --policy-url lists, or for a fixed "
        "list",
    )
    p.add_argument("--out", help="default: out/eval/<bench>")
    p.add_argument(
        "--report",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="report.html with every question's dialogue; it reads all pictures again (default: yes)",
    )
    p.add_argument(
        "--batch",
        type=COUNT,
        help="questions at once, of --policy-url requests on their way: memory and speed only (default: 8, of a tiny "
        "policy 64)",
    )
    p.add_argument("--threads", type=COUNT, help="CPU threads")


def main(argv: list[str] | None = None) -> None:
    """Ask (or go on asking) every question in every mode, then summarise."""
    args = parse_args(argv)
    world = setup(args.threads)
    lock_folder(args.out)
    if args.bench == "wm":
        measure_simulators(args, world)
        return
    out = Path(args.out)
    bench = open_bench(args.bench)
    questions = bench.load(args)[: args.limit]
    worth_asking(args, questions)
    policy, policy_name = open_policy(args, world.device)
    if args.mode in BASELINES:
        from extras.report.search import check_policy

        check_policy(policy)
    say(f"{args.bench}: {len(questions)} questions, policy {policy_name} on {world.device}")
    conditions = conditions_of(args, policy_name)
    for simulator_name in dict.fromkeys(condition.simulator_name for condition in conditions):
        simulator = load_simulator(simulator_name, world.device, args.wm, **args.sampler)
        for condition in conditions:
            if condition.simulator_name == simulator_name:
                ask_missing(policy, bench, questions, condition, simulator, args, world)
        del simulator
        gc.collect()  # a simulator is in a cycle, and two at once may not fit
    wait_for_all()
    if not is_main():
        return
    records = {}
    for condition in conditions:
        rows = answers.load_predictions(out, condition.settings, questions)
        records[condition.mode, condition.simulator_name] = rows
    results = conclude(args, policy_name, questions, records)
    names = ["results.json", "predictions.jsonl"]
    if has_extras():
        from extras.report import pages

        results["diagnosis"] = pages.causes(records)
        names += pages.write_answers(args, results, questions, records)
    else:
        say(NO_REPORT)
    write_json(out / "results.json", results)
    say(", ".join(f"{out}/{file}" for file in names))


if __name__ == "__main__":
    run_stage(main)
