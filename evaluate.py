"""
How well a policy answers, in which mode, with which simulator; and how true the simulator is.

  python evaluate.py --bench rooms                                held-out rooms: direct, forced and agentic, one table
  python evaluate.py --bench rooms --mode agentic --simulator tuned untuned truth
  python evaluate.py --bench mindcube --data path/to/data         MindCube (lib/benchmarks.py says what to fetch)
  python evaluate.py --bench wm                                   the simulator itself: is the view the commanded one?

In: the newest policy and simulator of out/ and out/demo/, out/data or out/demo/data.
Out, in out/eval/<bench>/: results.json, predictions.jsonl (a killed run continues from it), dialogues/, report.html;
of --bench wm: results.json, report.html, views/ (what was imagined), dose.png (commanded against recovered motion).

Modes: direct has no tool; forced must imagine before it answers; agentic is free to. Decoding is greedy. A question
whose images cannot be read is counted as wrong and reported, a duplicate id is asked again and reported: nothing leaves
the denominator but a question without a gold answer. Intervals are 95 % bootstrap intervals over rooms, since questions
about one room are not independent.
"""

import argparse
import hashlib
import json
import re
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import data
from lib import common, consistency, report, simulators
from lib.benchmarks import (BENCHES, LISTED_ONLY, error_group, group_weights, groups, lenient, load, open_image, prompt,
                            reply, score, weights)
from lib.clients import RemotePolicy, converse
from lib.dialogue import Trajectory
from lib.endpoint import RemoteError
from lib.geometry import Motion, Query, instruction, move_camera
from lib.pictures import save_image
from lib.questions import text_only_chance
from policy import Policy, rollout

MODES = ("direct", "forced", "agentic")
STRATA = {"needs_view": True, "answerable": False}
SAVED_DIALOGUES = 4             # per mode and simulator: the questions of the first room
RESAMPLES = 2000


# ---- asking ---------------------------------------------------------------------------------------------------------

def keyed(questions):
    """[(key, question)]: the key is the id, and "id#2" for the second question that carries it."""
    seen, pairs = Counter(), []
    for question in questions:
        seen[question["id"]] += 1
        number = seen[question["id"]]
        pairs.append((question["id"] if number == 1 else f"{question['id']}#{number}", question))
    return pairs


def evaluate_policy(policy, questions, simulator=None, mode="agentic", name="tuned", seed=0, batch=64,
                    max_new_tokens=256, done=(), on_batch=None):
    """Ask every question once, greedily, in one mode -> records, in the order of the questions.

    simulator   anything with imagine(queries), or None; unused in mode "direct". `name` is what the records call it
    batch       dialogues at once: memory and speed only
    done        keys (see `keyed`) that need not be asked; on_batch(records, trajectories) is told of every batch
    returns     [{"key", "mode", "simulator", "answer": letter read or None, "gold", "correct", "calls", "turns", …}]
    """
    simulator, name = (None, "none") if mode == "direct" else (simulator, name)
    waiting, records = [pair for pair in keyed(questions) if pair[0] not in set(done)], []
    for start in tqdm(range(0, len(waiting), batch), desc=f"{mode}, {name}", unit="batch", disable=not waiting):
        part, clock = waiting[start:start + batch], time.time()
        loaded = [load_images(question) for _, question in part]
        asked = [{**question, "images": images, "prompt": official_prompt(question, mode)}
                 for (_, question), (images, error) in zip(part, loaded) if not error]
        trajectories, stopped = ask(policy, asked, simulator, mode, seed, batch, max_new_tokens)
        trajectories = iter(trajectories)
        told = [RemoteError(error) if error else next(trajectories) for _, error in loaded]
        seconds = round((time.time() - clock) / len(part), 4)
        whole = [(pair, t) for pair, t in zip(part, told) if not (isinstance(t, RemoteError) and t.down)]
        told = [t if isinstance(t, Trajectory) else None for _, t in whole]
        new = [record_of(key, question, kept, None if kept else str(t),
                         {"mode": mode, "simulator": name, "seconds": seconds})
               for ((key, question), t), kept in zip(whole, told)]
        records += new
        if on_batch:
            on_batch(new, told)
        if stopped:
            raise stopped
    return records


def ask(policy, questions, simulator, mode, seed, batch, max_new_tokens):
    """-> a Trajectory per question, or a RemoteError in its place; and the RemoteError that stopped it, or None."""
    if not isinstance(policy, RemotePolicy):
        return (rollout(policy, questions, simulator, mode, temperature=0, seed=seed, rows=batch,
                        max_new_tokens=max_new_tokens) if questions else []), None
    try:
        return converse(policy, questions, simulator, mode, seed), None
    except RemoteError as error:                            # a server is down: what is complete is kept
        return error.results, error


def load_images(question):
    """-> (arrays (H, W, 3) uint8, None), or (None, what is wrong) if an image is missing or broken."""
    try:
        return [image if isinstance(image, np.ndarray) else np.asarray(open_image(image, question["bench"]))
                for image in question["images"]], None
    except (OSError, SyntaxError) as error:
        return None, f"image: {error}"


def official_prompt(question, mode):
    """What the bench's own code asks (`prompt`), or None where the policy is asked in its own words (lib/dialogue.py).

    MMSI-Video-Bench is always asked word for word, and a mode with a tool adds the tool's schema alone. Three others
    are asked so in direct mode: "reply with the letter only" and a call do not go together. MindCube asks for the same
    <think> and <answer> as our own prompt.
    """
    always, direct = ("mmsi_video",), ("mmsi", "sat", "vsi")
    return prompt(question) if question["bench"] in (*always, *(direct if mode == "direct" else ())) else None


def record_of(key, question, trajectory, error, more):
    """One line of predictions.jsonl; a question that could not be asked (trajectory None) is a wrong answer."""
    t, bench = trajectory or Trajectory(question, more["mode"]), question["bench"]
    turn = (t.answer or "") if bench == "rooms" else (t.turns or [""])[-1]
    read, correct = score(bench, question, turn if bench == "rooms" else reply(bench, turn))
    return {"key": key, "digest": digest(question), **more, "bench": bench, "kind": question["kind"],
            "category": question["category"], "groups": groups(question), "error_group": error_group(question),
            "needs_view": question["needs_view"],
            "scene": (question.get("scene") or {}).get("room", question.get("cluster", key)), "answer": read,
            "said": t.answer, "gold": question["answer"], "correct": correct, "lenient": lenient(question, turn)[1],
            "valid_calls": t.valid_calls,
            "invalid_calls": t.invalid_calls, "unreadable": t.unreadable, "truncated": t.truncated,
            "calls": [call for call in t.provenance if call], "turns": t.turns, "error": error,
            "missing_images": question.get("missing_images", 0)}


def digest(question):
    """A number that changes with the words of a question: an old answer to other words is no answer."""
    return common.stable_seed(question["question"], question["options"], question["answer"])


# ---- numbers --------------------------------------------------------------------------------------------------------

def interval(values, clusters=None, counted=None, seed=0):
    """95 % bootstrap interval of a mean, drawing whole clusters (rooms, videos) -> [low, high].

    counted   (n,) what each value counts in the mean; None: all the same
    """
    values = np.asarray(values, float)
    counted = np.ones(len(values)) if counted is None else counted
    names = np.arange(len(values)) if clusters is None else [str(cluster) for cluster in clusters]
    _, member = np.unique(names, return_inverse=True)
    sums, counts = np.bincount(member, values * counted), np.bincount(member, counted)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    return np.quantile(means, [0.025, 0.975]).round(4).tolist()


def brief(records, counted=None):
    """{"accuracy", "ci95", "call_rate", "n"}; call_rate is the share of questions with at least one valid call.

    counted   (n,) what each record counts in the accuracy (lib/benchmarks.weights); None: all the same
    """
    correct, scenes = ([record[key] for record in records] for key in ("correct", "scene"))
    return {"accuracy": float(np.average(correct, weights=counted)), "ci95": interval(correct, scenes, counted),
            "call_rate": float(np.mean([record["valid_calls"] > 0 for record in records])), "n": len(records)}


def summarise(records, direct=None, truth=None):
    """Everything the table shows of one mode with one simulator.

    direct   records of the same questions in mode direct: over_use, the share of questions on which the policy called
             though it is right without
    truth    and also records under forced use of the true view: under_use, the share on which it did not call though it
             is wrong without and right with the true view
    """
    records = sorted(records, key=lambda record: record["key"])
    gold = [record for record in records if record["gold"] is not None]
    counted = [record for record in gold if record["category"] not in LISTED_ONLY]
    if not counted:
        raise ValueError("no question has a gold answer: there is nothing to summarise")
    total = {key: sum(record[key] for record in counted) / len(counted)
             for key in ("lenient", "valid_calls", "invalid_calls", "unreadable", "truncated", "seconds")}
    bench, categories = counted[0]["bench"], [record["category"] for record in counted]
    summary = brief(counted, weights(bench, categories)) | total | {
        "by_category": {c: brief([record for record in gold if c in record["groups"]])
                        for c in sorted({group for record in gold for group in record["groups"]})},
        "by_need": {title: brief(part) for title, need in STRATA.items()
                    if (part := [record for record in counted if record["needs_view"] is need])},
        "letters": dict(sorted(Counter(record["answer"] or "none" for record in counted
                                       if record["kind"] == "mca").items())),
        "counts": {"no answer read": sum(record["answer"] is None for record in counted),
                   "image unreadable (counted as wrong)": sum(
                       (record["error"] or "").startswith("image: ") for record in counted),
                   "refused by the endpoint (counted as wrong)": sum(
                       not (record["error"] or "image: ").startswith("image: ") for record in counted),
                   "asked without a missing image": sum(record["missing_images"] > 0 for record in counted),
                   "duplicate id": sum("#" in record["key"] for record in records),
                   "no gold answer (left out)": len(records) - len(gold)}}
    if bench == "sat":                                          # some tables print this one beside the official one
        summary["mean_of_groups"] = float(group_weights(categories) @ [record["correct"] for record in counted])
    failures = Counter(record["error_group"] for record in counted if record["error_group"] and not record["correct"])
    if failures:                                                # MMSI-Video: the four error groups of its abstract
        summary["failures"] = dict(failures.most_common())
    called = {record["key"]: record["valid_calls"] > 0 for record in counted}
    if direct:
        alone = {record["key"]: record["correct"] for record in direct}
        summary["over_use"] = float(np.mean([called[key] and alone[key] == 1 for key in called]))
    if direct and truth:
        shown = {record["key"]: record["correct"] for record in truth}
        missed = [not called[key] and alone[key] < 1 and shown[key] == 1 for key in called]
        summary["under_use"] = float(np.mean(missed))
    return summary


def paired_bootstrap(records_a, records_b):
    """Accuracy of a minus accuracy of b on the same questions -> {"difference", "ci95", "n"}.

    Raises ValueError if the two were not asked the same questions.
    """
    a, b = ({record["key"]: record for record in records} for records in (records_a, records_b))
    if a.keys() != b.keys() or not a:
        raise ValueError(f"a paired comparison needs the same questions: {len(a.keys() ^ b.keys())} stand in one list")
    gain = [a[key]["correct"] - b[key]["correct"] for key in a]
    return {"difference": float(np.mean(gain)), "ci95": interval(gain, [a[key]["scene"] for key in a]), "n": len(gain)}


def chance(questions):
    """Expected accuracy of a blind guess: the mean of 1 / number of options."""
    options = [len(q["options"]) for q in questions if q["answer"] is not None and q["options"]]
    return float(np.mean([1 / n for n in options])) if options else None


# ---- the simulator itself -------------------------------------------------------------------------------------------

def load_triples(path, limit=None):
    """Rows of triples_*.jsonl with context, target and warp as arrays; files are read once."""
    rows, images = data.load_jsonl(path)[:limit], {}

    def read(place, kind="RGB"):
        if place not in images:
            images[place] = np.array(Image.open(place).convert(kind))
        return images[place]
    try:
        return [{**row, "context": [read(place) for place in row["context"]], "target": read(row["target"]),
                 "warp": read(row["warp"], "RGBA")} for row in rows]
    except OSError as error:
        common.fail(f"A picture of {path} cannot be read ({error}). Remove {path} and make it again: "
                    f"python data.py triples")


def fingers(row):
    """A number that changes with the pictures a simulator is shown: an old view of other pictures is no view."""
    return common.stable_seed([hashlib.sha256(image.tobytes()).hexdigest() for image in row["context"]])


def imagine_targets(simulator, rows, folder=None, batch=64, title="imagine"):
    """The view that the simulator gives for every triple; kept in `folder` so that a killed run continues."""
    views = []
    for start in tqdm(range(0, len(rows), batch), desc=title, unit="batch"):
        part = rows[start:start + batch]
        kept = [folder and Path(folder) / f"{row['id'].replace('/', '_')}_{fingers(row):016x}.png" for row in part]
        queries = [Query(row["context"], row["reference"], instruction(Motion(**row["motion"]), row["reference"]),
                         common.stable_seed("wm", row["id"]), {"room": row["room"], "poses": row["context_c2w"]})
                   for row, place in zip(part, kept) if not (place and place.exists())]
        new = iter(simulator.imagine(queries) if queries else [])
        for row, place in zip(part, kept):
            if place and place.exists():
                view = np.array(Image.open(place))
            else:
                view = np.asarray(next(new))
                if place:
                    save_image(place, view)
            shape = row["context"][row["reference"] - 1].shape                  # the target's shape as well
            if view.shape != shape:
                view = np.asarray(Image.fromarray(view).resize(shape[1::-1], Image.BICUBIC))
            views.append(view)
    return views


def print_consistency(results):
    """A table of pose and content: simulators, trivial baselines, oracles."""
    print(f"\n{'':32}{'pose':>7}{'moves':>8}{'turns':>8}{'content':>9}{'f1':>7}{'order':>7}{'thirds':>8}{'mse':>8}")
    for title in ("simulators", "baselines", "oracles"):
        for name, s in results[title].items():
            moves, turns = (s.get(family, {}).get("pose", float("nan")) for family in ("moves", "turns"))
            print(f"{name:32}{s['pose']:7.3f}{moves:8.3f}{turns:8.3f}{s['content']:9.3f}{s['f1']:7.3f}"
                  f"{s['order']:7.3f}{s['thirds']:8.3f}{s['mse']:8.4f}")


def dose_rows(rows, rooms):
    """One context of each of the first `rooms` rooms, under all motions of `consistency.DOSES` that end in free space.

    rows of `load_triples` -> rows without a target
    """
    first, doses = {}, []
    for row in rows:
        first.setdefault(row["room"], row)
    for row in list(first.values())[:rooms]:
        start = np.array(row["context_c2w"][row["reference"] - 1])
        doses += [{**{key: row[key] for key in ("room", "context", "reference", "context_c2w")},
                   "id": f"dose/{row['room']}_{motion.kind}_{motion.amount:g}",
                   "motion": {"kind": motion.kind, "amount": motion.amount}}
                  for motion in consistency.DOSES if data.stands_free(move_camera(start, motion))]
    return doses


def print_doses(dose):
    """Commanded against recovered motion, a line per simulator and kind."""
    print("\ncommanded -> recovered, median over rooms (turns: degrees, moves: meters; * = an amount never trained on)")
    for name, kinds in dose.items():
        for kind, told in kinds.items():
            digits = 0 if "turn" in kind else 2
            points = "  ".join(f"{p['amount']:g}{'' if p['trained'] else '*'}->{p['median']:.{digits}f}"
                               for p in told["points"])
            parts = ", ".join(f"{title} {told[key]:.2f}" for title, key in (
                ("trained on", "slope_trained"), ("new", "slope_new")) if told[key] is not None)
            print(f"{Path(name).name[:16]:16} {kind:13} slope {told['slope']:5.2f} ({parts})  "
                  f"r {told['correlation']:5.2f}   {points}")


def main_wm(args, device):
    """--bench wm."""
    out, source = Path(args.out), Path(args.data or default_data("triples_test.jsonl"))
    rows, views, dose = load_triples(source / "triples_test.jsonl", args.limit), {}, {}
    doses = dose_rows(rows, args.dose_rooms)
    for name in [name for name in args.simulator if name != "none"]:
        kept = out / "views" / f"{common.stable_seed(fingerprint(name, args.wm)):016x}"
        simulator = simulators.load(name, device, args.wm)
        views[name] = imagine_targets(simulator, rows, kept, args.batch, name)
        if doses:
            answers = imagine_targets(simulator, doses, kept, args.batch, f"{name}, doses")
            recovered, = consistency.recover_all(doses, answers)
            dose[name] = consistency.dose_response(doses, recovered, data.MOTIONS)
    results = consistency.compare(rows, views)
    print_consistency(results)
    if dose:
        print_doses(dose)
    first = next(iter(results["simulators"].values()), {})
    results = {"bench": "wm", **first, **results, "dose": dose, "n": len(rows)}
    common.write_json(out / "results.json", results)
    some = slice(None, None, max(1, len(rows) // 8))
    sheet = report.contact_sheet(rows[some], {name: seen[some] for name, seen in views.items()})
    curves = report.drawn(report.dose_curves(dose)) if dose else None           # None also without matplotlib
    if curves:
        curves.save(out / "dose.png")
    report.write(out / "report.html", "Pose and content consistency of the simulator", wm=results, sheet=sheet,
                 dose=curves)
    drawings = f", {out}/dose.png" if curves else ""
    common.say(f"\n{len(rows)} triples; {out}/results.json, {out}/report.html{drawings}")


# ---- command line ---------------------------------------------------------------------------------------------------

def default_data(file):
    """The folder of out/ or out/demo/ that holds `file`; made in out/data if there is none."""
    places = [folder for folder in (Path("out/data"), Path("out/demo/data")) if (folder / file).exists()]
    return places[0] if places else data.ensure("out/data")


def fingerprint(name, wm=None):
    """What tells one simulator (or policy folder) from another, or from the same folder trained anew."""
    place = simulators.find(name, wm) or name
    return f"{place}@{max((int(file.stat().st_mtime) for file in Path(place).glob('*.safetensors')), default=0)}"


def load_questions(args):
    """-> (questions, training questions or None) of the bench."""
    if args.bench != "rooms":
        ours = ["out/data/mindcube", "out/demo/data/mindcube"] if args.bench == "mindcube" else []   # rooms in disguise
        place = args.data or next((place for place in [f"data/{args.bench}", *ours] if Path(place).exists()), None)
        questions = load(args.bench, place, args.frames)
        common.say(f"{args.bench}: {len(questions)} questions of {place or f'data/{args.bench}'}")
        return questions[:args.limit], None
    folder = Path(args.data or default_data("questions_test.jsonl"))
    train, test = folder / "questions_train.jsonl", data.load_jsonl(folder / "questions_test.jsonl")[:args.limit]
    if any("mined" in question for question in test):
        common.fail(f"{folder}/questions_test.jsonl holds mined questions: they were chosen by what a model gets wrong "
                    f"and are for training only.")
    return test, data.load_jsonl(train) if train.exists() else None


def print_table(runs, blind):
    """The table: a row per part of the questions, a column per mode and simulator."""
    width, titles = 26, [mode if mode == "direct" else f"{mode}, {name}" for mode, name in runs]
    print("\n" + " " * 24 + "".join(f"{title:>{width}}" for title in titles))

    def shown(part):
        low, high = part["ci95"] if part else (0, 0)
        return f"{part['accuracy']:.3f} [{low:.2f} {high:.2f}] {part['call_rate']:4.0%}" if part else "-"
    summaries = list(runs.values())
    parts = [("all", summaries)]
    for group in ("by_need", "by_category"):
        parts += [(part, [s[group].get(part) for s in summaries]) for part in summaries[0][group]]
    for title, cells in parts:
        print(f"{title[:16]:16} n {cells[0]['n']:5}" + "".join(f"{shown(cell):>{width}}" for cell in cells))
    for key in ("lenient", "valid_calls", "invalid_calls", "seconds", "over_use", "under_use"):
        if any(key in s for s in summaries):
            cells = [f"{s[key]:.3f}" if key in s else "-" for s in summaries]
            print(f"{key:24}" + "".join(f"{cell:>{width}}" for cell in cells))
    print("accuracy [95 % interval] share of questions with a call;  chance: " +
          ", ".join(f"{key} {value:.3f}" for key, value in blind.items() if value is not None))
    for (mode, name), s in runs.items():
        said = ", ".join(f"{key}: {n}" for key, n in s["counts"].items() if n)
        print(f"{mode}, {name}: {said}" if said else "", end="\n" if said else "")


def parse_args(argv=None):
    """The command line's flags."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--bench", choices=(*BENCHES, "wm"), default="rooms")
    p.add_argument("--mode", choices=(*MODES, "all"), default="all")
    p.add_argument("--policy", help="folder or hub id (default: the first of phase2, phase1, sft in out/, out/demo/)")
    p.add_argument("--policy-url", help="instead: an OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1; its "
                   "key, if it needs one, is read from OPENAI_API_KEY")
    p.add_argument("--model", help="--policy-url: the model's name there")
    p.add_argument("--concurrency", type=int, default=8, help="--policy-url: requests on their way at a time")
    p.add_argument("--simulator", nargs="+",
                   help=f"one or more of {', '.join(simulators.NAMES)}, or the folder or hub id of a world model "
                        "(default: tuned; for --bench wm also untuned, if it has been trained)")
    p.add_argument("--wm", help="folder or hub id of the tuned simulator (default: out/wm, then out/demo/wm)")
    p.add_argument("--data", help="rooms, wm: folder of questions_test.jsonl, triples_test.jsonl (default: out/data); "
                   "the others: the published files (default: data/<bench>, fetched if it is not there)")
    p.add_argument("--frames", type=int, help="video benches: frames of a question (mmsi_video: 50 is Uniform-50, 300 "
                                              "Sufficient-Coverage; default 50; vsi: 32)")
    p.add_argument("--limit", type=int, help="only the first N questions or triples")
    p.add_argument("--dose-rooms", type=int, default=24, help="wm: rooms for commanded against recovered motion")
    p.add_argument("--out", help="default: out/eval/<bench>")
    p.add_argument("--max-new-tokens", type=int, help="per turn of the policy (default: 256; --policy-url: 4096, since "
                   "hidden reasoning counts)")
    p.add_argument("--seed", type=int, default=0, help="of the simulator's noise (decoding is greedy)")
    p.add_argument("--batch", type=int, default=64, help="questions at once: memory and speed only")
    p.add_argument("--threads", type=int, help="CPU threads")
    args = p.parse_args(argv)
    twin = ["untuned"] if args.bench == "wm" and common.newest(("wm-untuned",)) else []
    args.simulator = args.simulator or ["tuned", *twin]
    args.out = args.out or f"out/eval/{args.bench}"
    args.max_new_tokens = args.max_new_tokens or (4096 if args.policy_url else 256)
    if bool(args.policy_url) != bool(args.model) or (args.policy_url and args.policy):
        p.error("--policy-url and --model go together, and without --policy")
    return args


def open_policy(args, device):
    """-> (the policy, what it is called in the results)."""
    if args.policy_url:
        try:
            return RemotePolicy(args.policy_url, args.model, max_new_tokens=args.max_new_tokens,
                                at_once=args.concurrency), f"{args.model} at {args.policy_url}"
        except ValueError as error:
            common.fail(f"--policy-url: {error}")
    path = args.policy or common.newest(("phase2", "phase1", "sft")) or common.fail(
        "There is no policy in out/ yet. Train one with: python train_sft.py   (or name one with --policy)")
    return Policy.load(path, device), path


def main(argv=None):
    """Ask (or go on asking) every question in every mode, then summarise."""
    args = parse_args(argv)
    device = common.setup(args.threads).device
    if args.bench == "wm":
        return main_wm(args, device)
    out, modes = Path(args.out), MODES if args.mode == "all" else (args.mode,)
    questions, training = load_questions(args)
    if any(name in simulators.NEEDS_ROOM for name in args.simulator) and not all(q.get("scene") for q in questions):
        common.fail(f"--simulator {' '.join(args.simulator)} works in rooms only: --bench {args.bench} has no depth.")
    policy, path = open_policy(args, device)
    common.say(f"{args.bench}: {len(questions)} questions, policy {path} on {device}")

    file, pairs, records = out / "predictions.jsonl", keyed(questions), {}
    run = {"policy": fingerprint(str(path)), "seed": args.seed, "max_new_tokens": args.max_new_tokens,
           "frames": args.frames}
    kept = [row for row in common.read_log(file) if run.items() <= row.items()]
    common.write_text(file, "".join(json.dumps(row) + "\n" for row in kept))           # others were of another policy
    if not kept:
        shutil.rmtree(out / "dialogues", ignore_errors=True)
    for mode, name in [(mode, name) for mode in modes for name in (args.simulator if mode != "direct" else ["none"])]:
        source = "none" if mode == "direct" else fingerprint(name, args.wm)
        simulator = None if mode == "direct" else simulators.load(name, device, args.wm)
        same = [row for row in kept if (row["mode"], row["weights"]) == (mode, source)]
        answered = {(row["key"], row["digest"]): row for row in same}
        before = {key: answered[key, digest(q)] for key, q in pairs if (key, digest(q)) in answered}

        def keep(new, trajectories):
            with common.disk(file), open(file, "a") as lines:
                lines.writelines(json.dumps({**record, **run, "weights": source}) + "\n" for record in new)
            first = [key for key, _ in pairs[:SAVED_DIALOGUES if mode != "direct" else 0]]
            for record, trajectory in zip(new, trajectories):
                if trajectory and record["key"] in first:
                    trajectory.save(out / "dialogues" / f"{mode}_{Path(name).name}_{first.index(record['key']) + 1}")
        try:
            new = evaluate_policy(policy, questions, simulator, mode, name, args.seed, args.batch,
                                  args.max_new_tokens, before, keep)
        except KeyboardInterrupt:
            common.say(f"Stopped. The answers so far are in {file}; the same command goes on from there.")
            raise SystemExit(130) from None
        except RemoteError as error:
            common.fail(f"{error} The answers so far are in {file}; the same command goes on from there.")
        records[mode, name] = [*before.values(), *new]

    direct, truth = records.get(("direct", "none")), records.get(("forced", "truth"))
    runs = {run: summarise(rows, None if run[0] == "direct" else direct, truth) for run, rows in records.items()}
    blind = {"guessing": chance(questions), "text_only": training and text_only_chance(training, questions)}
    print_table(runs, blind)
    first = {mode: summary for (mode, name), summary in runs.items() if name in ("none", args.simulator[0])}
    results = {"bench": args.bench, "policy": str(path), "n": len(questions), "chance": blind["guessing"],
               "text_only_chance": blind["text_only"], "modes": first,
               "simulators": {name: {m: s for (m, n), s in runs.items() if n == name} for _, name in runs}}
    if direct and args.simulator[0] != "none" and "agentic" in first:
        pair = records["agentic", args.simulator[0]], direct
        results["agentic_minus_direct"] = {"all": paired_bootstrap(*pair)}
        for title, need in STRATA.items():
            parts = [[record for record in rows if record["needs_view"] is need] for rows in pair]
            results["agentic_minus_direct"] |= {title: paired_bootstrap(*parts)} if parts[0] else {}
    common.write_json(out / "results.json", results)
    folders = sorted((out / "dialogues").glob("*")) if (out / "dialogues").exists() else []
    report.write(out / "report.html", f"{args.bench}: {path}", results, logs=report.find_logs(Path(path).parent),
                 dialogues=[(folder.name, Trajectory.load(folder)) for folder in folders])
    common.say(f"{out}/results.json, {out}/predictions.jsonl, {out}/report.html")


if __name__ == "__main__":
    common.run(main)
