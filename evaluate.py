"""
How well a policy answers, in which mode, with which simulator; and how true the simulator is.

  python evaluate.py --bench rooms                                held-out rooms: direct, forced and agentic, one table
  python evaluate.py --bench rooms --mode agentic --simulator tuned untuned truth
  python evaluate.py --bench mindcube --data path/to/data         MindCube (extras/benches/mindcube.py says what to fetch)
  python evaluate.py --bench world2vlm                            World2VLM's eight tasks, by their rewards
  python evaluate.py --bench wm                                   the simulator itself: is the view the commanded one?
  python evaluate.py --bench wm --data out/heldout                the same in scans (extras/report/real_views.py)
  torchrun --standalone --nproc_per_node 8 evaluate.py …          the same numbers; every process asks its share

In: the newest policy and simulator of out/ and out/demo/, the newer of out/data and out/demo/data.
Out, in out/eval/<bench>/: results.json; report.html, every question as a dialogue; workflow.png, the modes side by side
per category (the paper's Figure 3); predictions.jsonl, from which a killed run continues, and views/, what was imagined
(lib/predictions.py). Of --bench wm: results.json, report.html, views/, dose.png (commanded against recovered motion).

Modes: direct has no tool; forced must imagine before it answers; agentic is free to. All three are asked in our words
(but for MMSI-Video-Bench, whose own are complete), and a dialogue whose answer the protocol never accepted is wrong.
official is direct in the words of MindCube (raw_qa), MMSI-Bench, SAT or VSI-Bench, which want a bare answer: a letter,
of MindCube a letter and its words, of SAT an option's words alone. Published numbers stand beside that one, the gain of
imagining beside direct. search and gate are baselines that need no training (extras/report/search.py): a beam search over
imagined views, a vote on whether to imagine. Decoding is greedy. A question whose images cannot be read is counted as
wrong and reported, and asked again by the next run; a duplicate id is asked again and reported: nothing leaves the
denominator but a question without a gold answer. Beside the accuracy stands what a question took: views, turns of the
policy, tokens, seconds. lib/scores.py makes the numbers, extras/report/diagnosis.py says in rooms why an answer is right or
wrong.
"""

import argparse
import gc
import re
import time
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data
import rewards
from extras.benches.rules import (
    BENCHES,
    FRAMES,
    LISTED_ONLY,
    error_group,
    groups,
    lenient,
    load,
    open_image,
    prompt,
    reply,
    score,
)
from extras.remote.client import RemotePolicy, converse, image_part, message_text, text_part
from extras.report import real_views, report, search
from extras.report.diagnosis import diagnose, tally
from extras.world2vlm import rewards as world2vlm_rewards
from lib import common, consistency, predictions, simulators, tables
from lib.dialogue import Trajectory
from lib.geometry import move_camera
from lib.images import PictureError, figure_image
from lib.predictions import digest, keyed
from lib.protocol import NOTE
from lib.questions import text_only_chance
from lib.scores import TOOLLESS, chance, summarise
from lib.simulators import SimulatorError
from lib.streams import stable_hash
from lib.views import imagine_targets, load_triples
from policy import Policy, rollout

MODES = ("direct", "forced", "agentic")
OWN_WORDS = ("mindcube", "mmsi", "sat", "vsi")  # benches with mode official
NEEDED = ("id", "bench", "images", "question", "answer", "category", "kind")  # of a question row
CALIBRATED = 40  # triples on which the metrics of --bench wm are calibrated


# ---- asking ---------------------------------------------------------------------------------------------------------


def evaluate_policy(
    policy,
    questions,
    simulator=None,
    mode="agentic",
    name="tuned",
    seed=0,
    batch=64,
    max_new_tokens=256,
    done=(),
    share=(0, 1),
    on_batch=None,
    primitives="mindjourney",
):
    """Ask every question once, greedily, in one mode -> records, in the order of the questions.

    simulator   anything with imagine(queries), or None; unused without a tool. `name` is what the records call it
    batch       dialogues at once: memory and speed only
    done        keys (lib/predictions.keyed) that need not be asked
    share       (rank, size): this process asks every size-th of the others, from number `rank` on
    on_batch    told (records, trajectories) of every batch; a question that could not be asked has None for the latter
    primitives  modes search and gate: of search.SPACES
    returns     [{"key", "mode", "simulator", "answer": letter read or None, "gold", "correct", "calls", "turns", …}]
    """
    simulator, name = (None, "none") if mode in TOOLLESS else (simulator, name)
    rank, size = share
    if isinstance(policy, RemotePolicy):  # it may serve one mode and refuse the tools of another
        policy.endpoint.served = bool(done)
    waiting, records = (
        [pair for pair in keyed(questions) if pair[0] not in set(done)][rank::size],
        [],
    )
    for start in tqdm(
        range(0, len(waiting), batch),
        desc=f"{mode}, {name}",
        unit="batch",
        disable=not waiting or not common.is_main(),
    ):
        part, clock = waiting[start : start + batch], time.time()
        loaded = [load_images(question) for _, question in part]
        asked = [
            {**question, "images": images, "prompt": official_prompt(question, mode)}
            for (_, question), (images, error) in zip(part, loaded)
            if not error
        ]
        trajectories, stopped = ask(
            policy, asked, simulator, mode, seed, batch, max_new_tokens, primitives
        )
        trajectories = iter(trajectories)
        told = [SimulatorError(error) if error else next(trajectories) for _, error in loaded]
        seconds = round((time.time() - clock) / len(part), 4)
        whole = [
            (pair, t)
            for pair, t in zip(part, told)
            if not (isinstance(t, SimulatorError) and t.down)
        ]
        told = [t if isinstance(t, Trajectory) else None for _, t in whole]
        new = [
            record_of(
                key,
                question,
                kept,
                None if kept else str(t),
                {"mode": mode, "simulator": name, "seconds": seconds},
            )
            for ((key, question), t), kept in zip(whole, told)
        ]
        records += new
        if on_batch:
            on_batch(new, told)
        if stopped:
            raise stopped
    return records


def ask(policy, questions, simulator, mode, seed, batch, max_new_tokens, primitives):
    """-> a Trajectory per question, or a SimulatorError in its place; and the SimulatorError that stopped it, or None."""
    mode = "direct" if mode in TOOLLESS else mode
    if not isinstance(policy, RemotePolicy) and mode in NOTE:
        return (
            rollout(
                policy,
                questions,
                simulator,
                mode,
                temperature=0,
                seed=seed,
                rows=batch,
                max_new_tokens=max_new_tokens,
            )
            if questions
            else []
        ), None
    try:
        if mode in search.METHODS:
            return search.METHODS[mode](
                policy, questions, simulator, seed, search.SPACES[primitives], max_new_tokens, batch
            ), None
        return converse(policy, questions, simulator, mode, seed), None
    except SimulatorError as error:  # a server is down: what is complete is kept
        return error.results, error


def load_images(question):
    """-> (arrays (H, W, 3) uint8, None), or (None, what is wrong) if an image is missing or broken."""
    try:
        return [
            image
            if isinstance(image, np.ndarray)
            else np.asarray(open_image(image, question["bench"]))
            for image in question["images"]
        ], None
    except (OSError, PictureError) as error:
        return None, f"image: {error}"


def official_prompt(question, mode):
    """What the bench's own code asks (`prompt`), or None where the policy is asked in its own words (lib/dialogue.py).

    MMSI-Video-Bench is always asked word for word, and a mode with a tool adds the tool's schema alone. OWN_WORDS are
    asked so in mode official: "reply with the answer only" goes together neither with a call nor with thoughts.
    """
    return prompt(question) if question["bench"] == "mmsi_video" or mode == "official" else None


def record_of(key, question, trajectory, error, more):
    """One line of predictions.jsonl; a question that could not be asked (trajectory None) is a wrong answer."""
    t = trajectory or Trajectory(question, more["mode"])
    scene = (question.get("scene") or {}).get("room", question.get("cluster", key))
    return {
        "key": key,
        "digest": digest(question),
        **more,
        "bench": question["bench"],
        "kind": question["kind"],
        "category": question["category"],
        "groups": groups(question),
        "error_group": error_group(question),
        "needs_view": question.get("needs_view"),
        "scene": scene,
        "gold": question["answer"],
        "said": t.answer,
        **verdict(question, t, more["mode"]),
        "well_formed": t.well_formed,
        "valid_calls": t.valid_calls,
        "invalid_calls": t.invalid_calls,
        "unreadable": t.unreadable,
        "truncated": t.truncated,
        "calls": [call for call in t.provenance if call],
        "turns": t.turns,
        "replies": t.replies,
        "error": error,
        "missing_images": question.get("missing_images", 0),
        "cost": search.cost_of(t),
        "diagnosis": trajectory and diagnose(question, t),
    }


def verdict(question, t, mode="direct"):
    """-> {"answer": what was read, "correct", "lenient"} by the bench's rules; World2VLM's has "exact" and "parts".

    Except in mode official, a dialogue without an accepted answer (no call in mode forced, cut off in its thoughts)
    has said nothing, and SAT, whose own rule knows no letters, is read by `lenient`, since our words show them.
    """
    bench, last = (
        question["bench"],
        (t.turns or [""])[-1] if mode == "official" or t.answer is not None else "",
    )
    if bench == "world2vlm":
        parts = world2vlm_rewards.world2vlm(question["category"], question["answer"], t.answer)
        exact = float(parts["total"] > world2vlm_rewards.FULL)
        return {
            "answer": t.answer,
            "correct": parts["total"],
            "lenient": exact,
            "exact": exact,
            "parts": parts,
        }
    said = (t.answer or "") if bench == "rooms" else last
    forgiving = lenient(question, said)
    read, correct = (
        forgiving
        if bench == "sat" and mode != "official"
        else score(bench, question, said if bench == "rooms" else reply(bench, said))
    )
    return {"answer": read, "correct": correct, "lenient": forgiving[1]}


def dialogues(records, questions):
    """What the report shows of every question in every mode: its record and row, in the order of the questions.

    records   {(mode, simulator): {key: record}}
    returns   records with "question", "run", "hurt": wrong after a call, though right in mode direct; and "reward"
    """
    direct, rows = records.get(("direct", "none"), {}), []
    for key, question in keyed(questions):
        for (mode, name), answered in records.items():
            record = answered[key]
            alone = direct[key]["correct"] if key in direct else None
            rows.append(
                {
                    **record,
                    "question": question,
                    "run": mode if mode in TOOLLESS else f"{mode}, {name}",
                    "hurt": alone is not None
                    and record["valid_calls"] > 0
                    and record["correct"] < alone,
                    "reward": record.get("parts") or reward_parts(record, alone),
                }
            )
    return rows


def reward_parts(record, alone):
    """The terms of rewards.py. alone: exact match in mode direct, one greedy answer, or None if it is not known."""
    match, form, calls = record["correct"], float(record["well_formed"]), record["valid_calls"]
    parts = {
        "match": match,
        "format": form,
        "calls": calls,
        "phase 1": rewards.phase1_reward(match, form, calls),
    }
    if alone is not None:
        parts |= {
            "gain": rewards.tool_gain(match, calls, alone),
            "phase 2": rewards.phase2_reward(match, form, calls, alone),
        }
    return parts


# ---- the simulator itself -------------------------------------------------------------------------------------------


def dose_rows(rows, rooms):
    """One context of each of the first `rooms` rooms, under all motions of `consistency.DOSES` that end in free space.

    rows of `load_triples` -> rows without a target
    """
    first, doses = {}, []
    for row in rows:
        first.setdefault(row["room"], row)
    for row in list(first.values())[:rooms]:
        start = np.array(row["context_c2w"][row["reference"] - 1])
        doses += [
            {
                **{key: row[key] for key in ("room", "context", "reference", "context_c2w")},
                "id": f"dose/{row['room']}_{motion.kind}_{motion.amount:g}",
                "motion": {"kind": motion.kind, "amount": motion.amount},
            }
            for motion in consistency.DOSES
            if data.stands_free(move_camera(start, motion))
        ]
    return doses


def instruments(args, rows, device):
    """What measures views of scans -> (match, detect or None, ask or None), see extras/report/real_views.py.

    Stops with a sentence where a pose cannot be found; says so where only content cannot.
    """
    if names := [name for name in args.simulator if name in simulators.NEEDS_ROOM]:
        common.fail(
            f"--simulator {' '.join(names)} works in rooms only: these triples are of scans."
        )
    if not all("context_depth" in row for row in rows):
        common.fail(
            "These triples have no depth of their context views, by which poses are found: an older data.py "
            "made them. Make them again in an empty folder: python data.py triples --dataset ..."
        )
    policy = open_policy(args, device)[0] if args.policy_url else None

    def ask(images, question):
        parts = [*map(image_part, images), text_part(question)]
        try:
            return message_text(policy.ask([{"role": "user", "content": parts}])[0])
        except SimulatorError as error:
            common.fail(f"{error} The views are kept; the same command measures them.")

    try:
        match = real_views.matcher(args.matcher, device)
    except ValueError as error:
        common.fail(f"Poses in scans are found by a matcher. {error}")
    try:
        detect = real_views.detector(args.detector, device)
    except ValueError as error:
        common.say(f"Content is left out. {error}")
        return match, None, None
    if not policy:
        common.say(
            f"No --policy-url lists the categories, so these are looked for: {', '.join(real_views.INDOOR)}."
        )
    return match, detect, policy and ask


def main_wm(args, world):
    """--bench wm: every process imagines its share, the first one measures."""
    out, source = (
        Path(args.out),
        Path(args.data or first_alone(partial(default_data, "triples_test.jsonl"))),
    )
    rows, views, dose = load_triples(source / "triples_test.jsonl", args.limit), {}, {}
    if not rows:
        common.fail(
            f"{source}/triples_test.jsonl holds no triples. Remove it and make it again: "
            f"python data.py triples"
        )
    scans = "room" not in rows[0]
    doses = [] if scans else dose_rows(rows, args.dose_rooms)
    tools = (
        instruments(args, rows, world.device) if scans and common.is_main() else ()
    )  # before the work
    kept = {
        name: out / "views" / f"{stable_hash(fingerprint(name, args.wm)):016x}"
        for name in args.simulator
        if name != "none"
    }
    for name, folder in kept.items():
        own = [*rows, *doses][world.rank :: world.size]
        if name.startswith(simulators.URLS) and folder.exists():
            common.say(
                f"Views of {name} that lie in {folder} are not imagined again; remove it to ask anew."
            )
        try:
            imagine_targets(
                simulators.load_simulator(name, world.device, args.wm),
                own,
                folder,
                args.batch or 64,
                name,
            )
        except SimulatorError as error:
            common.fail(
                f"{error} The views so far are in {folder}; the same command goes on from there."
            )
    common.wait_for_all()  # all views are in their folders
    if not common.is_main():
        return
    for name, folder in kept.items():
        views[name] = imagine_targets(None, rows, folder, title=f"{name}, look")
        if doses:
            (recovered,) = consistency.recover_all(
                doses, imagine_targets(None, doses, folder, title=f"{name}, doses")
            )
            dose[name] = consistency.dose_response(doses, recovered, data.MOTIONS)
    some = rows[:: max(1, len(rows) // CALIBRATED)]
    if scans:
        results = {
            **real_views.compare_scans(rows, views, *tools),
            "calibration": {},
            "matcher": args.matcher,
            "detector": args.detector if tools[1] else None,
            "categories": args.model if tools[2] else "indoor",
        }
    else:
        results = {**consistency.compare(rows, views), "calibration": consistency.calibration(some)}
    tables.consistency(results)
    if dose:
        tables.doses(dose)
    first = next(iter(results["simulators"].values()), {})
    results = {"bench": "wm", **first, **results, "dose": dose, "n": len(rows)}
    results = common.readable(results)  # JSON has no nan
    common.write_json(out / "results.json", results)
    some = slice(None, None, max(1, len(rows) // 8))
    sheet = report.contact_sheet(rows[some], {name: seen[some] for name, seen in views.items()})
    curves = (
        figure_image(report.dose_curves(dose)) if dose else None
    )  # None also without matplotlib
    if curves:
        curves.save(out / "dose.png")
    report.write(
        out / "report.html",
        "Pose and content consistency of the simulator",
        wm=results,
        sheet=sheet,
        dose=curves,
    )
    drawings = f", {out}/dose.png" if curves else ""
    common.say(f"\n{len(rows)} triples; {out}/results.json, {out}/report.html{drawings}")


# ---- command line ---------------------------------------------------------------------------------------------------


def first_alone(work):
    """work() on rank 0, then on the others, who find the files that it fetched or made."""
    done = work() if common.is_main() else None
    common.wait_for_all()
    return done if common.is_main() else work()


def default_data(file):
    """The newer folder of out/data and out/demo/data that holds `file`; made in out/data if there is none."""
    return common.newest(("data",), file) or data.ensure("out/data")


def fingerprint(name, wm=None):
    """What tells one simulator (or policy folder) from another, or from the same folder trained or configured anew."""
    place = simulators.find_weights(name, wm) or name
    files = [file for kind in ("*.safetensors", "*.json") for file in Path(place).glob(kind)]
    return f"{place}@{max((int(file.stat().st_mtime) for file in files), default=0)}"


def load_questions(args):
    """-> (questions, training questions or None) of the bench."""
    if args.bench == "world2vlm":
        file = Path(args.data or "out/world2vlm") / "questions_test.jsonl"
        common.need(file, "python data.py world2vlm")
        return whole_rows(file)[: args.limit], None
    if args.bench != "rooms":
        ours = [
            f"{folder}/{args.bench}" for folder in ("out/data", "out/demo/data")
        ]  # rooms in disguise
        place = args.data or next(
            (place for place in [f"data/{args.bench}", *ours] if Path(place).exists()), None
        )
        questions = load(args.bench, place, args.frames)
        common.say(f"{args.bench}: {len(questions)} questions of {place or f'data/{args.bench}'}")
        return questions[: args.limit], None
    folder = Path(args.data or default_data("questions_test.jsonl"))
    train, test = (
        folder / "questions_train.jsonl",
        whole_rows(folder / "questions_test.jsonl")[: args.limit],
    )
    if any("mined" in question for question in test):
        common.fail(
            f"{folder}/questions_test.jsonl holds mined questions: they were chosen by what a model gets wrong "
            f"and are for training only."
        )
    return test, whole_rows(train) if train.exists() else None


def whole_rows(file):
    """The question rows of a file; stops with a sentence at one that lacks what every question has."""
    rows = data.load_jsonl(file)
    for number, row in enumerate(rows, 1):
        if lacking := " and no ".join(key for key in NEEDED if key not in row):
            common.fail(
                f"{file}, question {number} has no {lacking}; delete the file and make it again"
            )
    return rows


def worth_asking(args, questions):
    """Stop with a sentence where there would be nothing to count, or no question has an image to look at."""
    if not any(q["answer"] is not None and q["category"] not in LISTED_ONLY for q in questions):
        common.fail(
            f"None of the {len(questions)} questions of --bench {args.bench} has a gold answer that counts: "
            f"there is nothing to measure. Give the published file with --data, or a larger --limit."
        )
    images = [str(image) for question in questions for image in question["images"]]
    if not any(Path(re.sub(r"\.mp4#\d+/\d+$", ".mp4", image)).exists() for image in images):
        named = f" (the first would be {images[0]})" if images else ""
        common.fail(
            f"Not one image of the {len(questions)} questions of --bench {args.bench} is there{named}. Unpack "
            f"the images beside the questions, or give the folder that holds both with --data."
        )


def parse_args(argv=None):
    """The command line's flags."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--bench", choices=(*BENCHES, "world2vlm", "wm"), default="rooms")
    p.add_argument(
        "--mode",
        choices=(*MODES, "official", *search.METHODS, "all"),
        default="all",
        help=f"all (default): {', '.join(MODES)}, for {', '.join(OWN_WORDS)} also official; search, gate: "
        "the baselines; world2vlm: direct alone",
    )
    p.add_argument(
        "--primitives",
        choices=list(search.SPACES),
        help="search, gate: what the camera may do. rooms: as "
        "the tiny simulator was trained (default of --bench rooms and of the tiny policy), mindjourney: the "
        "published steps",
    )
    p.add_argument(
        "--policy",
        help="folder or hub id (default: the newest of phase2, phase1, sft in out/, out/demo/; "
        "world2vlm: of w2v-rl, w2v)",
    )
    p.add_argument(
        "--policy-url",
        help="instead: an OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1; its "
        "key, if it needs one, is read from OPENAI_API_KEY",
    )
    p.add_argument("--model", help="--policy-url: the model's name there")
    p.add_argument(
        "--concurrency", type=int, default=8, help="--policy-url: requests on their way at a time"
    )
    p.add_argument(
        "--simulator",
        nargs="+",
        help=f"one or more of {', '.join(simulators.NAMES)}, or the folder or hub id of a world model "
        "(default: tuned; for --bench wm also untuned, if it has been trained)",
    )
    p.add_argument(
        "--wm", help="folder or hub id of the tuned simulator (default: out/wm, then out/demo/wm)"
    )
    p.add_argument(
        "--data",
        help="rooms, wm: folder of questions_test.jsonl, triples_test.jsonl (default: the newer "
        "of out/data and out/demo/data); world2vlm: of questions_test.jsonl (out/world2vlm); others: the "
        "published files (default: data/<bench>, fetched if it is not there)",
    )
    p.add_argument(
        "--frames",
        type=int,
        help="video benches: frames of a question (mmsi_video: 50 is Uniform-50, 300 "
        "Sufficient-Coverage; default 50; vsi: 32)",
    )
    p.add_argument("--limit", type=int, help="only the first N questions or triples")
    p.add_argument(
        "--dose-rooms",
        type=int,
        default=24,
        help="wm: rooms for commanded against recovered motion",
    )
    p.add_argument(
        "--matcher",
        default=real_views.MATCHER,
        help="wm in scans: folder or hub id of a keypoint matcher",
    )
    p.add_argument(
        "--detector",
        default=real_views.DETECTOR,
        help="wm in scans: folder or hub id of a GroundingDINO; "
        "it looks for what --policy-url lists, or for a fixed list",
    )
    p.add_argument("--out", help="default: out/eval/<bench>")
    p.add_argument(
        "--report",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="report.html with every question's dialogue; it reads all pictures again (default: yes)",
    )
    p.add_argument(
        "--max-new-tokens",
        type=int,
        help="per turn of the policy (default: 4096, of a tiny policy 256; "
        "of --policy-url hidden reasoning counts too)",
    )
    p.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the simulator's noise (decoding is greedy; --bench wm: each "
        "view has noise of its own, whatever the seed)",
    )
    p.add_argument(
        "--batch",
        type=int,
        help="questions at once: memory and speed only (default: of a tiny policy 64, "
        "of a published one 8, of --policy-url --concurrency; search, gate: 4 or so for an 8B policy that "
        "reads sheets of many views)",
    )
    p.add_argument("--threads", type=int, help="CPU threads")
    args = common.at_least(
        p,
        p.parse_args(argv),
        [
            ("dose_rooms", 0),
            *(
                (key, 1)
                for key in ("limit", "batch", "max_new_tokens", "frames", "concurrency", "threads")
            ),
        ],
    )
    twin = ["untuned"] if args.bench == "wm" and common.newest(("wm-untuned",)) else []
    args.simulator = args.simulator or ["tuned", *twin]
    args.out = args.out or f"out/eval/{args.bench}"
    if bool(args.policy_url) != bool(args.model) or (args.policy_url and args.policy):
        p.error("--policy-url and --model go together, and without --policy")
    if args.mode == "official" and args.bench not in OWN_WORDS:
        p.error(
            f"--mode official is of {', '.join(OWN_WORDS)}: --bench {args.bench} is asked in one way only"
        )
    if args.bench == "world2vlm":
        if args.mode not in ("direct", "all"):
            p.error("world2vlm asks without a tool: --mode direct")
        args.mode = "direct"
    return args


def open_policy(args, device):
    """-> (the policy, what it is called in the results)."""
    if args.policy_url:
        try:
            return RemotePolicy(
                args.policy_url,
                args.model,
                max_new_tokens=args.max_new_tokens,
                at_once=args.concurrency,
            ), f"{args.model} at {args.policy_url}"
        except ValueError as error:
            common.fail(f"--policy-url: {error}")
    stages, first = (
        (("w2v-rl", "w2v"), "train_sft.py --task world2vlm")
        if args.bench == "world2vlm"
        else (("phase2", "phase1", "sft"), "train_sft.py")
    )
    path = (
        args.policy
        or common.newest(stages)
        or common.fail(
            f"There is no {' or '.join(stages)} in out/ yet. Train one with: python {first}   (or name one with --policy)"
        )
    )
    return Policy.load(path, device), path


def main(argv=None):
    """Ask (or go on asking) every question in every mode, then summarise."""
    args = parse_args(argv)
    world = common.setup(args.threads)
    if args.bench == "wm":
        return main_wm(args, world)
    every = MODES + (("official",) if args.bench in OWN_WORDS else ())
    out, modes = Path(args.out), every if args.mode == "all" else (args.mode,)
    questions, training = first_alone(partial(load_questions, args))
    worth_asking(args, questions)
    if any(name in simulators.NEEDS_ROOM for name in args.simulator) and not all(
        q.get("scene") for q in questions
    ):
        common.fail(
            f"--simulator {' '.join(args.simulator)} works in rooms only: --bench {args.bench} has no depth."
        )
    policy, path = open_policy(args, world.device)
    args.max_new_tokens = args.max_new_tokens or policy.turn_limit
    published = (
        policy.turn_limit >= RemotePolicy.turn_limit
    )  # 64 dialogues of an 8B policy: some 100 GB
    args.batch = args.batch or (args.concurrency if args.policy_url else 8 if published else 64)
    common.say(f"{args.bench}: {len(questions)} questions, policy {path} on {world.device}")

    run = {
        "version": predictions.VERSION,
        "policy": fingerprint(str(path)),
        "seed": args.seed,
        "max_new_tokens": args.max_new_tokens,
        "frames": (args.frames or FRAMES[args.bench]) if args.bench in FRAMES else None,
    }
    asked = {
        (mode, name): "none" if mode in TOOLLESS else fingerprint(name, args.wm)
        for mode in modes
        for name in (args.simulator if mode not in TOOLLESS else ["none"])
    }
    tiny = args.bench == "rooms" or search.way_of(policy) == "confidence"
    args.primitives = args.primitives or ("rooms" if tiny else "mindjourney")
    if args.mode in search.METHODS:  # other primitives, other answers
        asked = {pair: f"{source}, {args.primitives}" for pair, source in asked.items()}
    if common.is_main():
        predictions.gather(out)
    common.wait_for_all()
    simulator = loaded = None
    remote = {
        url
        for (mode, name), source in asked.items()
        for url in (args.policy_url, name)
        if url
        and url.startswith(simulators.URLS)
        and predictions.answered(out, run, mode, source, questions)
    }
    if remote:
        common.say(
            f"Old answers of {' and '.join(sorted(remote))} in {out} count again, whatever serves there now; to "
            f"ask anew, give another --out."
        )
    for (mode, name), source in asked.items():
        if mode not in TOOLLESS and name != loaded:
            simulator = None  # two at once may not fit, and a model is in a cycle
            gc.collect()
            simulator, loaded = simulators.load_simulator(name, world.device, args.wm), name
        before = predictions.answered(out, run, mode, source, questions)

        def keep(new, trajectories):
            for record, t in zip(new, trajectories):
                views = t.images[len(t.images) - len(record["calls"]) :] if t else []
                record["views"] = predictions.save_views(out, views)
            predictions.append(out, world, [{**record, **run, "weights": source} for record in new])

        try:
            evaluate_policy(
                policy,
                questions,
                simulator,
                mode,
                name,
                args.seed,
                args.batch,
                args.max_new_tokens,
                before,
                (world.rank, world.size),
                keep,
                args.primitives,
            )
        except KeyboardInterrupt:
            common.say(
                f"Stopped. The answers so far are in {out}; the same command goes on from there."
            )
            raise SystemExit(130) from None
        except SimulatorError as error:
            common.fail(
                f"{error} The answers so far are in {out}; the same command goes on from there."
            )
    common.wait_for_all()
    if common.is_main():
        predictions.gather(out)
        records = {
            pair: predictions.told(out, run, pair[0], source, questions)
            for pair, source in asked.items()
        }
        conclude(args, str(path), questions, training, records, search.way_of(policy))


def conclude(args, path, questions, training, records, way):
    """The table, results.json, workflow.png and report.html of {(mode, simulator): {key: record}}.

    way   how modes search and gate judged (search.way_of)
    """
    out, rows = (
        Path(args.out),
        {pair: list(answered.values()) for pair, answered in records.items()},
    )
    direct, truth, first_name = (
        rows.get(("direct", "none")),
        rows.get(("forced", "truth")),
        args.simulator[0],
    )
    runs = {
        pair: summarise(told, None if pair[0] == "direct" else direct, truth)
        for pair, told in rows.items()
    }
    runs = {
        pair: summary | {"cost": search.mean_cost(rows[pair])} for pair, summary in runs.items()
    }
    blind = {
        "guessing": chance(questions),
        "text_only": training and text_only_chance(training, questions),
    }
    tables.answers(runs, blind)
    for (mode, name), s in runs.items():
        took = ", ".join(
            f"{key.replace('_', ' ')} {value:,.1f}" for key, value in s["cost"].items()
        )
        print(f"{mode}, {name}, per question: {took}")
    first = {
        mode: summary
        for (mode, name), summary in runs.items()
        if name == ("none" if mode in TOOLLESS else first_name)
    }
    causes = {pair: found for pair, told in rows.items() if (found := tally(told))}
    results = {
        "bench": args.bench,
        "policy": path,
        "n": len(questions),
        "chance": blind["guessing"],
        "text_only_chance": blind["text_only"],
        "modes": first,
        "simulators": {name: {m: s for (m, n), s in runs.items() if n == name} for _, name in runs},
        "diagnosis": {
            mode: {n: found for (m, n), found in causes.items() if m == mode} for mode, _ in causes
        },
    }
    if args.mode in search.METHODS:
        results["search"] = {"judged_by": way, "primitives": args.primitives}
    common.write_json(out / "results.json", results)
    workflow = figure_image(report.workflow(results))
    if workflow:  # None without matplotlib
        workflow.save(out / "workflow.png")
    if args.report:
        report.write(
            out / "report.html",
            f"{args.bench}: {path}",
            results,
            logs=report.find_logs(Path(path).parent),
            dialogues=dialogues(records, questions),
            folder=out,
        )
    written = (
        "results.json",
        "predictions.jsonl",
        *(["workflow.png"] if workflow else []),
        *(["report.html"] if args.report else []),
    )
    common.say(", ".join(f"{out}/{name}" for name in written))


if __name__ == "__main__":
    common.run(main)
