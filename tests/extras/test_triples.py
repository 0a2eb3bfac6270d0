"""Triples of scans: which pairs poses allow, which context is chosen, and what a run leaves on disk."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from room_scan import room_scene, write_kinect, write_scan_folder

from extras.scans.frames import thousandths
from extras.scans.heldout import make_heldout
from extras.scans.make import make_scans, places_and_lists, places_of, split_of
from extras.scans.scene import read_scene
from extras.scans.summary import Summary
from extras.scans.triples import (
    Rules,
    choose_context,
    find_triples,
    fit,
    may_stand_together,
    motions_between,
    open_cameras,
    targets_in_turn,
    write_triples,
)
from lib.consistency import pose_errors
from lib.geometry import (
    Motion,
    camera_pose,
    decompose,
    dominant_component,
    dominant_motion,
    motion_along,
    move_camera,
)
from lib.records import load_jsonl

SMALL = Rules(size=64, frames=40, targets=3, triples=6)


def write_scan(folder, seed, spoil=None):
    """A walk through a room as a plain folder; spoil(rgb) may change its pictures."""
    scene = room_scene(seed, 40, 64)
    frames = (
        scene.frames
        if spoil is None
        else [replace(frame, load=partial(spoil, frame.image())) for frame in scene.frames]
    )
    write_scan_folder(folder, frames, pictures=".png")


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    root = tmp_path_factory.mktemp("scans")
    for seed in range(3):
        write_scan(root / f"scan{seed}", seed)
    return root


def files(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent.parent.name != "scans" and path.name != "summary.json"
    }  # reports hold CPU seconds


def groups_of(scene, rules):
    """All contexts of a scene with their targets, the frames that they count in, and what fell out."""
    frames, cameras, counts = open_cameras(scene, rules)
    rng = np.random.default_rng(0)
    groups = list(find_triples(frames, cameras, scene.metric, rng, rules, counts))
    return groups, frames, counts


def differences(c2w):
    """(N, N, 6): how cameras (N, 4, 4) differ."""
    return decompose(c2w[:, None], c2w[None])


# ---- by pose --------------------------------------------------------------------------------------------------------


def test_pairs_fall_out_by_pose_with_the_reason():
    start = camera_pose(0, -1.3, 0)
    cameras = [
        start,
        move_camera(start, Motion("dx", -1.0)),
        move_camera(start, Motion("dangle", 60.0)),
        move_camera(start, Motion("dz", 0.1)),
        move_camera(camera_pose(1, -1.3, 0), Motion("dangle", 45.0)),
    ]
    _, main, counts = motions_between(np.stack(cameras), True, Rules())
    assert main[0].tolist() == [
        -1,
        0,
        3,
        -1,
        -1,
    ]  # itself; a move; a turn; too small; a move and a turn
    assert main[1, 0] == 0 and main[2, 0] == 3
    assert counts["too small a motion"] == 2  # 0 to 3 and back
    _, main, counts = motions_between(np.stack(cameras), False, Rules())
    assert main[0].tolist() == [-1, -1, 3, -1, -1] and counts["a move without a metric scale"] > 0


def test_pairs_with_a_camera_that_looks_straight_down_are_counted():
    cameras = np.stack(
        [camera_pose(x, -1.3, 0, 0, pitch) for x, pitch in ((0, 0), (1, 0), (1, -88))]
    )
    _, main, counts = motions_between(cameras, True, Rules())
    assert main.tolist() == [[-1, 0, -1], [0, -1, -1], [-1, -1, -1]]
    assert counts["a camera looks straight up or down"] == 4 and not counts["not one motion"]


@pytest.mark.slow
def test_a_scan_that_looks_down_gives_as_many_triples():
    """The same walk through three rooms, level and 20 degrees down; in the cameras' own axes it gave 19 of 142."""
    pairs, targets = {}, {}
    for pitch in (0, -20):
        targets[pitch] = 0
        for seed in range(3):
            scene = room_scene(seed, frames=60, pitch=pitch)
            c2w = np.stack([frame.c2w for frame in scene.frames])
            pairs[pitch, seed] = motions_between(c2w, True, Rules())[1]
            groups, _, _ = groups_of(scene, Rules(size=64))
            targets[pitch] += sum(len(group.targets) for group in groups)
    for seed in range(3):
        assert (pairs[0, seed] == pairs[-20, seed]).all()
    assert targets[0] > 100 and targets[-20] > 0.95 * targets[0]


def test_context_cameras_are_apart_by_a_metre_or_by_thirty_degrees():
    cameras = {
        "itself": camera_pose(0, -1.3, 0),
        "a metre aside": camera_pose(1.0, -1.3, 0),
        "turned": camera_pose(0, -1.3, 0, 30),
        "a metre higher": camera_pose(0, -2.3, 0),
        "looks up": camera_pose(0, -1.3, 0, 0, 30),
        "ten centimetres and a degree short": camera_pose(0.9, -1.3, 0, 29),
        "each axis short": camera_pose(0.8, -2.1, 0, 20, 20),
    }
    delta = differences(np.stack(list(cameras.values())))
    stand = dict(zip(cameras, may_stand_together(delta, True, Rules())[0].tolist(), strict=True))
    short = ("itself", "ten centimetres and a degree short", "each axis short")
    assert stand == {name: name not in short for name in cameras}
    cameras = [camera_pose(*spot) for spot in ((0, -1.3, 0), (1.0, -1.3, 0, 30), (1.0, -1.3, 0))]
    both = may_stand_together(differences(np.stack(cameras)), True, Rules(both_apart=True))
    assert both[0].tolist() == [False, True, False]  # the paper's text
    # without a scale the angle alone decides
    assert may_stand_together(delta, False, Rules())[0].nonzero()[0].tolist() == [2, 4]


def test_kinds_of_motion_take_turns():
    main = np.array([3] * 20 + [0] * 2 + [-1] * 5)
    delta = np.zeros((27, 6))
    delta[:10, 3], delta[10:20, 3], delta[20:22, 0] = 30, -30, 1
    chosen = targets_in_turn(delta, main, np.random.default_rng(0))[:6]
    moves = sorted((main[k], delta[k, main[k]]) for k in chosen)
    assert moves == [(0, 1), (0, 1), (3, -30), (3, -30), (3, 30), (3, 30)]


def test_a_context_grows_by_the_camera_that_covers_most_and_stays_apart():
    sees = np.array(
        [[1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]], bool
    )
    target = np.ones((6, 1))  # one, with all six points

    def choose(together, rules):
        return choose_context(0, [1, 2, 3], together, sees, target, rules)

    free = np.ones((4, 4), bool)
    context, covered = choose(free, Rules())
    assert context == [0, 2, 3] and covered == [1]  # 1 would bring nothing more
    near = free.copy()
    near[2, 3] = near[3, 2] = False
    context, covered = choose(near, Rules())
    assert context == [0, 2] and covered == [4 / 6]
    assert choose(free, Rules(context=2))[0] == [0, 2]


def test_found_targets_keep_every_rule():
    scene = room_scene(0, frames=60)
    found, frames, counts = groups_of(scene, Rules(size=64))
    assert found and counts["candidates"] > 0
    c2w = np.stack([frame.c2w for frame in frames])
    stands = may_stand_together(differences(c2w), True, Rules())
    for group in found:
        context, reference = group.context, group.context[group.reference]
        assert 2 <= len(context) <= 4
        assert all(stands[a, b] for a in context for b in context if a != b)
        for k, motion in group.targets:
            assert k not in context and dominant_motion(c2w[reference], c2w[k]) == motion


def test_all_references_are_tried_and_the_papers_rule_takes_every_pair():
    """A camera that walks along a wall, and pitches and rolls a little: few pairs are one motion by our rule."""
    poses = np.stack([camera_pose(0.1 * i, -1.3, 0, 4 * i % 35, 8 * np.sin(i)) for i in range(20)])
    few = motions_between(poses, True, Rules())[1] >= 0
    more = motions_between(poses, True, Rules(slack=0.3))[1] >= 0
    paper = motions_between(poses, True, Rules(slack=np.inf))
    assert 0 < few.sum() < more.sum() < (paper[1] >= 0).sum()
    assert not paper[2]["not one motion"]
    groups, frames, counts = groups_of(room_scene(0, frames=40), Rules(size=64))
    assert len(groups) > 6
    tried = len(frames) - counts["reference without targets or neighbours"]
    assert len({group.context[group.reference] for group in groups}) == len(groups) <= tried


def test_a_frame_whose_depth_is_unknown_stands_in_no_triple():
    scene = room_scene(1, frames=12)
    holes = np.where(np.arange(64) < 40, 0, scene.frames[3].depth()).astype(np.float32)
    frames = [*scene.frames]
    frames[3] = replace(frames[3], load_depth=lambda: holes)
    fit_frames, _, counts = open_cameras(scene._replace(frames=frames), Rules())
    assert counts["depth of too little of the frame"] == 1
    assert len(fit_frames) == 11 and frames[3] not in fit_frames
    fit_frames, _, _ = open_cameras(scene._replace(frames=frames), Rules(known=0.3))
    assert len(fit_frames) == 12


def test_a_picture_is_never_enlarged():
    assert fit((1296, 968), 512) == (512, 382) and fit((968, 1296), 512) == (382, 512)
    assert fit((256, 192), 512) == (256, 192)


# ---- by picture -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_same_triples_come_out_of_a_folder_as_out_of_the_room(scans, tmp_path):
    room, _ = write_triples(room_scene(1, 40), tmp_path / "room", 5, Rules(size=64))
    folder, _ = write_triples(
        read_scene("folder", scans, "scan1"), tmp_path / "folder", 5, Rules(size=64)
    )
    assert len(room) == len(folder) > 8
    for a, b in zip(room, folder, strict=True):
        assert (a["instruction"], a["reference"]) == (b["instruction"], b["reference"])
        np.testing.assert_allclose(a["target_c2w"], b["target_c2w"], atol=1e-6)
        np.testing.assert_allclose(a["context_c2w"], b["context_c2w"], atol=1e-6)
        assert abs(a["coverage"] - b["coverage"]) < 0.005 and a["coverage"] >= 0.85


@pytest.mark.slow
def test_a_blurred_capture_gives_no_triples(tmp_path):
    def spoil(rgb):
        return np.mean([np.roll(rgb, shift, 1) for shift in range(9)], 0).astype(np.uint8)

    write_scan(tmp_path / "scans" / "shaky", 2, spoil=spoil)
    rows, counts = write_triples(
        read_scene("folder", tmp_path / "scans", "shaky"), tmp_path / "out", 0, SMALL
    )
    assert not rows and counts["blurred"] > 3


@pytest.mark.slow
def test_a_hand_held_kinect_gives_true_triples_and_depth_of_another_camera_none(tmp_path):
    """Camera that pitches and rolls, smeared frames, quantised depth with holes: words stay true. The same walk with depth
    2.5 cm beside the picture is refused, though its views agree with each other."""
    rules = Rules(apart_meters=0.5, apart_degrees=20, targets=3, triples=6)
    kept, refused = {}, {}
    for name in ("registered", "raw"):
        write_kinect(tmp_path / name / "room", 0, frames=40, registered=name == "registered")
        scene = read_scene("folder", tmp_path / name, "room")
        kept[name], refused[name] = write_triples(scene, tmp_path / "out" / name, 0, rules)
    rows = kept["registered"]
    assert len(rows) >= 4 and refused["registered"]["blurred"] >= 3
    deltas = []
    for row in rows:
        reference = np.array(row["context_c2w"][row["reference"] - 1])
        deltas.append(decompose(reference, np.array(row["target_c2w"]))[:5])
        names = [Path(picture).stem for picture in (*row["context"], row["target"])]
        assert not any(name.endswith("5") for name in names)  # every tenth frame is smeared
    assert all(error["within"] for error in pose_errors(rows, deltas))
    assert refused["raw"]["registration"] > 4 * len(kept["raw"])


@pytest.mark.slow
def test_rows_are_what_training_reads(scans, tmp_path):
    make_scans("folder", scans, tmp_path, 1, rules=SMALL, lists={"test": listed(tmp_path, "scan2")})
    rows = load_jsonl(tmp_path / "triples_train.jsonl")
    assert rows and {row["scene"] for row in rows} <= {"folder/scan0", "folder/scan1"}
    for row in rows:
        pictures = [
            np.array(Image.open(place)) for place in (*row["context"], row["target"], row["warp"])
        ]
        assert [p.shape for p in pictures] == [(64, 64, 3)] * (len(pictures) - 1) + [(64, 64, 4)]
        warped, target = pictures[-1], pictures[-2].astype(float)
        seen = warped[..., 3] > 0
        assert seen.mean() >= 0.85 and np.abs(warped[seen][:, :3] - target[seen]).mean() < 12


def test_the_depth_of_every_context_view_stands_beside_its_picture(tmp_path):
    scene = room_scene(1, 40)
    rows, _ = write_triples(scene, tmp_path, 5, Rules(size=64, targets=2, triples=4))
    frames = {frame.name: frame for frame in scene.frames}
    for row in rows:
        for k, (picture, depth) in enumerate(
            zip(row["context"], row["context_depth"], strict=True)
        ):
            assert depth == picture.replace(".jpg", "_depth.png")
            metres, frame = (
                np.array(Image.open(tmp_path / depth)) / 1000,
                frames[Path(picture).stem],
            )
            assert metres.shape == (64, 64) and (metres > 0).all()
            np.testing.assert_allclose(metres, frame.depth((64, 64)), atol=6e-4)
            np.testing.assert_allclose(row["context_intrinsics"][k], frame.K((64, 64)), atol=1e-4)
    shown = {place for row in rows for place in row["context_depth"]}
    assert {
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*_depth.png")
    } == shown
    odd = thousandths(np.array([0.0, 1.2346, 65.535, 65.6, np.nan, np.inf, -1]))
    assert odd.tolist() == [0, 1235, 65535, 0, 0, 0, 0] and odd.dtype == np.uint16


# ---- a run ----------------------------------------------------------------------------------------------------------


def listed(folder, *ids):
    file = folder / "ids.txt"
    file.write_text("\n".join(ids))
    return file


@pytest.mark.slow
def test_the_files_are_the_same_whatever_the_workers_and_after_an_interruption(scans, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    make_scans("folder", scans, one, 1, rules=SMALL)
    make_scans("folder", scans, two, 2, rules=SMALL)
    assert files(one) == files(two)
    report = two / "scans" / "folder" / "scan1.json"
    before, kept = report.read_bytes(), (two / "scans" / "folder" / "scan0.json").stat().st_mtime_ns
    report.unlink()
    (two / "triples_train.jsonl").unlink()
    make_scans("folder", scans, two, 1, rules=SMALL)
    assert files(one) == files(two)
    assert json.loads(before)["rows"] == json.loads(report.read_bytes())["rows"]
    assert (
        two / "scans" / "folder" / "scan0.json"
    ).stat().st_mtime_ns == kept  # finished: not done again
    make_scans("folder", scans, two, 1, seed=1, rules=SMALL)
    assert files(one) != files(two)


@pytest.mark.slow
def test_a_broken_scan_is_named_and_the_rest_goes_on(tmp_path, capsys):
    root = tmp_path / "root"
    write_scan(root / "good", 0)
    write_scan(root / "torn", 1)
    for i in range(0, 40, 10):
        picture = root / "torn" / "rgb" / f"{i}.png"
        picture.write_bytes(picture.read_bytes()[:300])
    (root / "empty").mkdir()
    (root / "empty" / "scene.json").write_text('{"frames": []}')
    make_scans("folder", root, tmp_path / "out", 1, rules=SMALL)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(summary["broken"]) == ["empty"] and summary["scans"] == 3 and summary["kept"] > 3
    said = capsys.readouterr().out
    assert "broken: empty: The folder scene" in said
    assert "no scan for val: --val FILE lists them" in said
    rows = [
        json.loads(line)
        for line in (tmp_path / "out" / "triples_train.jsonl").read_text().splitlines()
    ]
    assert {row["scene"] for row in rows} == {"folder/good", "folder/torn"}
    shown = {
        Path(place).stem
        for row in rows
        if row["scene"] == "folder/torn"
        for place in (*row["context"], row["target"])
    }
    assert len(shown) > 4 and not shown & {f"{i:06d}_{i}" for i in range(0, 40, 10)}
    with pytest.raises(SystemExit, match="nowhere"):
        make_scans("folder", tmp_path / "nowhere", tmp_path / "out", 1)


def test_a_summary_adds_up():
    total, row = Summary(), {"motion": {"kind": "dangle", "amount": -45.0}}
    for id, error in (("a", ""), ("b", "It is empty.")):
        total.add(
            {
                "id": id,
                "counts": {"kept": 1, "coverage": 2},
                "skipped": {"no depth": 3},
                "gravity": "z up, as the dataset has it" if id == "a" else "",
                "note": "",
                "error": error,
                "cpu_seconds": 1.0,
                "rows": [row, {"motion": {"kind": "dz", "amount": 0.5}}],
            },
            "train",
        )
    found = total.facts
    assert found["kept"] == 2
    assert found["rejected"] == {"coverage": 4}
    assert found["broken"] == {"b": "It is empty."}
    assert found["motions"] == {"dangle": 2, "dz": 2} and found["per_scan"] == 1.0
    assert "kept, by motion" in total.text()
    assert found["gravity"] == {"z up, as the dataset has it": 1}
    assert "  gravity\n           1  z up, as the dataset has it" in total.text()


# ---- held out -------------------------------------------------------------------------------------------------------


def test_no_place_is_on_two_sides_of_the_split(tmp_path):
    ids = [f"scene{place:04d}_{scan:02d}" for place in range(300) for scan in range(3)]
    places = places_of("scannet", tmp_path, ids)
    assert places == {id: id[:9] for id in ids}
    assert places_of("dl3dv", tmp_path, ids) == {id: id for id in ids}
    sides = [split_of("scannet", place, {}) for place in places.values()]
    shares = [sides.count(side) / len(sides) for side in ("test", "val")]
    assert 0.02 < shares[0] < 0.09 and 0.005 < shares[1] < 0.045


def test_a_list_replaces_the_draw_and_takes_whole_places(tmp_path):
    ids = [f"scene{place:04d}_{scan:02d}" for place in range(300) for scan in range(2)]
    lists = {"test": listed(tmp_path, "scene0007_01")}
    places, sides = places_and_lists("scannet", tmp_path, ids, lists)
    assert sides == {"scene0007": "test"}
    splits = {id: split_of("scannet", places[id], sides, lists) for id in ids}
    assert [id for id, split in splits.items() if split == "test"] == [
        "scene0007_00",
        "scene0007_01",
    ]
    assert "val" in splits.values()  # this one is still drawn
    for id in set(ids) - {"scene0007_00", "scene0007_01"}:  # and nothing else goes elsewhere
        drawn = split_of("scannet", places[id], {})
        assert splits[id] == ("train" if drawn == "test" else drawn)
    (tmp_path / "val.txt").write_text("scene0007_00")
    with pytest.raises(SystemExit, match="a place stands on one side"):
        places_and_lists("scannet", tmp_path, ids, lists | {"val": tmp_path / "val.txt"})


@pytest.mark.parametrize(
    "text",
    [
        "scan1\nscan2\n",
        "id,place,fold\nscan1,x,Validation\n\nscan2,y,Validation\n",
        ',video_id,fold\n0,"scan1",Validation\n1,scan2,Validation\nscan9',
    ],
)
def test_official_lists_are_read(text, tmp_path, capsys):
    (tmp_path / "list.csv").write_text(text)
    _, sides = places_and_lists(
        "folder", tmp_path, ["scan1", "scan2", "scan3"], {"test": tmp_path / "list.csv"}
    )
    assert sides == {"scan1": "test", "scan2": "test"}
    missing = {"s": None, "i": "1 of 3 lines", ",": "2 of 4 lines"}[text[0]]
    assert (f"--test: {missing} " in capsys.readouterr().out) == bool(missing)
    with pytest.raises(SystemExit, match="No line of .*list.csv names a scan .* such as room7"):
        places_and_lists("folder", tmp_path, ["room7"], {"test": tmp_path / "list.csv"})
    with pytest.raises(SystemExit, match="does not exist; --val names"):
        places_and_lists("folder", tmp_path, ["scan1"], {"val": tmp_path / "none.txt"})


def test_arkit_captures_of_one_visit_stay_together(tmp_path, capsys):
    """As in the official metadata: some captures have no visit, and numbers may be those of pandas."""
    ids = [str(41000000 + k) for k in range(300)]
    with pytest.raises(
        SystemExit, match="no metadata.csv with the visit_id .* both --val FILE and --test FILE"
    ):
        places_and_lists("arkitscenes", tmp_path, ids, {"test": listed(tmp_path, ids[0])})
    (tmp_path / "val.txt").write_text(ids[1])
    both = {"test": listed(tmp_path, ids[0]), "val": tmp_path / "val.txt"}
    places, sides = places_and_lists("arkitscenes", tmp_path, ids, both)
    assert len(places) == 300 and sides == {ids[0]: "test", ids[1]: "val"}
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/metadata.csv").write_text(
        "video_id,visit_id,fold\n"
        + "".join(
            f"{id},{'NA' if k >= 298 else f'{380000 + k // 3}.0' if k % 2 else 380000 + k // 3},Training\n"
            for k, id in enumerate(ids)
        )
    )
    places, sides = places_and_lists("arkitscenes", tmp_path, ids, {})
    assert places == {id: str(380000 + k // 3) for k, id in enumerate(ids[:298])} and not sides
    assert "2 scans are left out: nobody knows which place" in capsys.readouterr().out
    lists = {"test": listed(tmp_path, ids[4], ids[299])}
    places, sides = places_and_lists("arkitscenes", tmp_path, ids, lists)
    splits = {id: split_of("arkitscenes", place, sides, lists) for id, place in places.items()}
    assert [id for id, split in splits.items() if split == "test"] == [
        ids[k] for k in (3, 4, 5, 299)
    ]


@pytest.mark.slow
def test_a_second_dataset_does_not_drop_the_first(scans, tmp_path):
    out = tmp_path / "out"
    make_scans("folder", scans, out, 1, rules=SMALL, limit=1)
    before = files(out)
    write_scan(tmp_path / "more" / "kitchen", 1)
    with pytest.raises(SystemExit, match="train_wm.py --data takes several folders"):
        make_scans("folder", tmp_path / "more", out, 1, rules=SMALL)
    assert files(out) == before
    make_scans("folder", scans, out, 1, rules=SMALL, limit=2)  # more scans of the same are welcome
    rows = load_jsonl(out / "triples_train.jsonl")
    assert len({row["scene"] for row in rows}) == 2
    assert all(f"folder/{row['place']}" == row["scene"] for row in rows)


@pytest.mark.slow
def test_the_held_out_set_takes_as_many_of_each_dataset_and_refuses_shared_places(scans, tmp_path):
    source = tmp_path / "a"
    make_scans(
        "folder", scans, source, 1, rules=SMALL, lists={"test": listed(tmp_path, "scan1", "scan2")}
    )
    make_heldout([source], tmp_path / "held", per_dataset=5)
    rows = load_jsonl(tmp_path / "held" / "triples_test.jsonl")
    with pytest.raises(
        SystemExit, match="python data.py triples --dataset NAME --root DIR --out .*nowhere"
    ):
        make_heldout([tmp_path / "nowhere"], tmp_path / "held", per_dataset=5)
    assert len(rows) == 5 and {row["scene"] for row in rows} == {"folder/scan1", "folder/scan2"}
    assert all(
        Image.open(place).size == (64, 64)
        for row in rows
        for place in (*row["context"], row["target"])
    )
    with pytest.raises(SystemExit, match="triples of test scans"):
        make_heldout([source], tmp_path / "held", per_dataset=500)
    train = source / "triples_train.jsonl"
    train.write_text(train.read_text() + (source / "triples_test.jsonl").read_text())
    with pytest.raises(SystemExit, match="both sides"):
        make_heldout([source], tmp_path / "held", per_dataset=5)
    train.write_text(
        json.dumps({**json.loads(train.read_text().splitlines()[0]), "place": None}).replace(
            '"place": null', '"older": 0'
        )
        + "\n"
    )
    with pytest.raises(SystemExit, match="does not tell the place"):
        make_heldout([source], tmp_path / "held", per_dataset=5)


def test_what_its_own_photograph_would_fail_is_not_held_out(tmp_path, capsys):
    """By the paper's rule 0.2 m to the right and 0.14 m forward is "move 0.2 meters to the right", 35 degrees off."""
    rows = []
    for k, way in enumerate(
        [(0.2, 0, 0.14), (0.2, 0, 0.06), (-1.0, 0, 0.15), (0, 0, 0, 12.0), (0, 0, 0, 90.0, 17.0)]
    ):
        delta = decompose(np.eye(4), camera_pose(*way))
        motion = motion_along(delta, dominant_component(delta, np.inf))
        rows.append(
            {
                "id": str(k),
                "scene": "folder/a",
                "place": "a",
                "dataset": "folder",
                "reference": 2,
                "motion": {"kind": motion.kind, "amount": motion.amount},
                "context": ["0.jpg"] * 2,
                "context_depth": ["0.png"] * 2,
                "target": "1.jpg",
                "warp": "2.png",
                "context_c2w": [camera_pose(5, 5, 5).tolist(), camera_pose(1, -1, 2, 70).tolist()],
                "target_c2w": (camera_pose(1, -1, 2, 70) @ camera_pose(*way)).tolist(),
            }
        )
    assert rows[0]["motion"] == {"kind": "dx", "amount": 0.2}
    np.testing.assert_allclose(
        decompose(*np.array([rows[0]["context_c2w"][1], rows[0]["target_c2w"]]))[:3],
        [0.2, 0.14, 0],
        atol=1e-9,
    )
    (tmp_path / "a").mkdir()
    (tmp_path / "a/triples_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a/triples_train.jsonl").write_text("")
    make_heldout([tmp_path / "a"], tmp_path / "held", per_dataset=3)
    assert "3 triples of 1 test scans; left out: 2 whose own pose" in capsys.readouterr().out
    kept = load_jsonl(tmp_path / "held" / "triples_test.jsonl")
    assert sorted(row["id"] for row in kept) == ["1", "2", "3"]
    with pytest.raises(
        SystemExit, match="has 3 triples of test scans that do what their words say, and 4"
    ):
        make_heldout([tmp_path / "a"], tmp_path / "held", per_dataset=4)
