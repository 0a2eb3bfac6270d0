"""The tables that evaluate.py prints at the end."""

from pathlib import Path

from lib.scores import TOOLLESS


def answers(runs, blind):
    """The table: a row per part of the questions, a column per mode and simulator; then the gain over mode direct."""
    width, titles = 26, [mode if mode in TOOLLESS else f"{mode}, {name}" for mode, name in runs]
    summaries, parts = list(runs.values()), [("all", list(runs.values()))]
    for group in ("by_need", "by_category"):
        parts += [(part, [s[group].get(part) for s in summaries]) for part in summaries[0][group]]
    wide = max(16, *(len(title) for title, _ in parts))  # names of a bench's types are long
    print("\n" + " " * (wide + 8) + "".join(f"{title:>{width}}" for title in titles))

    def shown(part):
        low, high = part["ci95"] if part else (0, 0)
        last = part.get("exact", part["call_rate"]) if part else 0
        return f"{part['accuracy']:.3f} [{low:.2f} {high:.2f}] {last:4.0%}" if part else "-"

    for title, cells in parts:
        print(
            f"{title:{wide}} n {cells[0]['n']:5}"
            + "".join(f"{shown(cell):>{width}}" for cell in cells)
        )
    beside = "exact" if "exact" in summaries[0] else "lenient"
    for key in (beside, "valid_calls", "invalid_calls", "seconds", "over_use", "under_use"):
        if any(key in s for s in summaries):
            cells = [f"{s[key]:.3f}" if key in s else "-" for s in summaries]
            print(f"{key:{wide + 8}}" + "".join(f"{cell:>{width}}" for cell in cells))
    title = (
        "mean reward [95 % interval] share of rewards of 1"
        if "exact" in summaries[0]
        else "accuracy [95 % interval] share of questions with a call"
    )
    print(
        "; ".join(
            [
                title,
                *(
                    f"chance, {key} {value:.3f}"
                    for key, value in blind.items()
                    if value is not None
                ),
            ]
        )
    )
    gained = [k for k, s in enumerate(summaries) if "gain" in s]
    if gained:
        print("\naccuracy beyond direct on the same questions [95 % interval]")
        print(" " * (wide + 8) + "".join(f"{titles[k]:>{width}}" for k in gained))
        for title, cells in parts:
            gains = [cells[k]["gain"] if cells[k] else None for k in gained]
            told = [
                "{:+.3f} [{:+.2f} {:+.2f}]".format(gain["difference"], *gain["ci95"])
                if gain
                else "-"
                for gain in gains
            ]
            print(
                f"{title:{wide}} n {cells[0]['n']:5}" + "".join(f"{cell:>{width}}" for cell in told)
            )
    for (mode, name), s in runs.items():
        said = ", ".join(f"{key}: {n}" for key, n in s["counts"].items() if n)
        print(f"{mode}, {name}: {said}" if said else "", end="\n" if said else "")


def consistency(results):
    """A table of pose and content: simulators, trivial baselines, oracles, views with a known error."""
    print(
        f"\n{'':32}{'pose':>7}{'moves':>8}{'turns':>8}{'content':>9}{'f1':>7}{'order':>7}{'thirds':>8}{'mse':>8}"
    )
    for title in ("simulators", "baselines", "oracles", "calibration"):
        for name, s in results[title].items():
            name = f"known error: {name}" if title == "calibration" else name
            moves, turns = (
                s.get(family, {}).get("pose", float("nan")) for family in ("moves", "turns")
            )
            print(
                f"{name:32}{s['pose']:7.3f}{moves:8.3f}{turns:8.3f}{s['content']:9.3f}{s['f1']:7.3f}"
                f"{s['order']:7.3f}{s['thirds']:8.3f}{s['mse']:8.4f}"
            )


def doses(dose):
    """Commanded against recovered motion, a line per simulator and kind."""
    print(
        "\ncommanded -> recovered, median over rooms (turns: degrees, moves: meters; * = an amount never trained on)"
    )
    for name, kinds in dose.items():
        for kind, told in kinds.items():
            digits = 0 if "turn" in kind else 2
            points = "  ".join(
                f"{p['amount']:g}{'' if p['trained'] else '*'}->{p['median']:.{digits}f}"
                for p in told["points"]
            )
            parts = ", ".join(
                f"{title} {told[key]:.2f}"
                for title, key in (("trained on", "slope_trained"), ("new", "slope_new"))
                if told[key] is not None
            )
            print(
                f"{Path(name).name[:16]:16} {kind:13} slope {told['slope']:5.2f} ({parts})  "
                f"r {told['correlation']:5.2f}   {points}"
            )
