"""A teacher whole in memory and one walked beforehand say the same; what is kept on disk is used again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

import small
import zoo
from contract import ids_of, load, rounding_of
from understudy.errors import NumericError, OutputError, UnsupportedModelError
from understudy.skeleton import Skeleton
from understudy.training import hidden
from understudy.training.lessons import Lessons
from understudy.training.teacher import Resident, Streamed, Teacher, open_teacher

S, HIDDEN = 12, zoo.HIDDEN
PLENTY = 1 << 60  # bytes that no machine has

# plain; biased and with sinks; a correction bias and a dense first layer; capped logits; state beside hidden states
FAMILIES = ["olmoe", "gpt_oss", "deepseek_v3", "gemma4", "zaya"]


def lessons_of(count: int, seed: int, padded: bool = True) -> Lessons:
    """Random sequences; some are padded on the right."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, 60, (count, S)).astype(np.int32)
    mask = np.ones((count, S), bool)
    for row in range(0, count if padded else 0, 2):
        mask[row, rng.integers(3, S) :] = False
    ids[~mask] = 0
    labels = np.where(mask, ids, -100).astype(np.int32)
    return Lessons(ids, labels, mask, digest=str(seed))


def batch_of(lessons: Lessons, rows: Sequence[int]) -> dict[str, Tensor]:
    """What a loader puts together."""
    return torch.utils.data.default_collate([lessons[row] for row in rows])


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.model_folder(tmp_path_factory.mktemp(request.param) / "model", request.param)


def allowed(folder: Path) -> float:
    """What an expert gets together depends on the batch, and the order of its sums with it."""
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    return max(1e-5, 4 * rounding_of(load(folder, model_type), ids_of()))


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.model_folder(tmp_path_factory.mktemp("olmoe") / "model")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Walk four sequences together."""
    monkeypatch.setattr(hidden, "_WALKED_TOKENS", 4 * S)


@contextmanager
def opened(folder: Path, parts: Sequence[Lessons], work: Path, streamed: bool, **more: object) -> Iterator[Teacher]:
    skeleton = Skeleton(folder, device="cpu", dtype=str(more.pop("dtype", "auto")))
    with open_teacher(skeleton, parts, beside_bytes=0, work=work, streamed=streamed, **more) as teacher:  # type: ignore[arg-type]
        yield teacher


def test_streamed_says_what_resident_says(family: Path, tmp_path: Path) -> None:
    train, held_out = lessons_of(9, 0), lessons_of(3, 1)
    asked = [batch_of(train, [8, 2, 5]), batch_of(held_out, [2, 0]), batch_of(train, [0])]
    with opened(family, (train, held_out), tmp_path, False) as resident:
        expected = [resident.logits(batch) for batch in asked]
    with opened(family, (train, held_out), tmp_path, True) as streamed:
        found = [streamed.logits(batch) for batch in asked]
    assert isinstance(resident, Resident) and isinstance(streamed, Streamed)
    for batch, got, wanted in zip(asked, found, expected, strict=True):
        assert got.shape == wanted.shape == (*batch["input_ids"].shape, zoo.VOCAB)
        assert not got.requires_grad and not wanted.requires_grad
        looked_at = batch["attention_mask"].bool()
        torch.testing.assert_close(got[looked_at], wanted[looked_at], rtol=0, atol=allowed(family))


def test_padding_on_the_right_changes_nothing_before_it(family: Path, tmp_path: Path) -> None:
    lessons, atol = lessons_of(4, 0), allowed(family)
    other = Lessons(np.where(lessons.mask, lessons.ids, 7), lessons.labels, lessons.mask, "other")
    with opened(family, (lessons, other), tmp_path, True) as teacher:
        zeros, sevens = (teacher.logits(batch_of(x, range(4))) for x in (lessons, other))
    with opened(family, (), tmp_path, False) as teacher:
        for row in range(4):
            length = int(lessons.mask[row].sum())
            ids = torch.from_numpy(lessons.ids[row : row + 1, :length]).long()
            alone = teacher.logits({"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0]
            torch.testing.assert_close(zeros[row, :length], alone, rtol=0, atol=atol)
            torch.testing.assert_close(sevens[row, :length], alone, rtol=0, atol=atol)
    padded = ~torch.from_numpy(lessons.mask)
    assert (zeros - sevens)[padded].abs().max() > 0.1  # else this would show nothing


def test_both_say_what_the_model_says(olmoe: Path, tmp_path: Path) -> None:
    lessons = lessons_of(4, 0, padded=False)
    batch = batch_of(lessons, range(4))
    with torch.no_grad():
        expected = zoo.tiny_model("olmoe")(input_ids=batch["input_ids"]).logits
    for streamed in (False, True):
        with opened(olmoe, (lessons,), tmp_path, streamed) as teacher:
            assert torch.equal(teacher.logits(batch), expected)  # the batch is that of the walk: to the bit


def test_mixed_precision_around_it_does_not_reach_the_teacher(olmoe: Path, tmp_path: Path) -> None:
    lessons = lessons_of(4, 0)
    batch = batch_of(lessons, [3, 1])
    for streamed in (False, True):
        with opened(olmoe, (lessons,), tmp_path, streamed) as teacher:
            expected = teacher.logits(batch)
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(teacher.logits(batch), expected)
            assert expected.dtype == torch.float32


def files(work: Path) -> dict[str, tuple[int, int]]:
    """Every file with the time of its last change and its size."""
    found = [(path, path.stat()) for path in work.rglob("*") if path.is_file()]
    return {str(path.relative_to(work)): (stat.st_mtime_ns, stat.st_size) for path, stat in found}


def test_hidden_states_take_two_bytes_each(tmp_path: Path) -> None:
    folder = small.model_folder(tmp_path / "model", dtype=torch.bfloat16)
    lessons = lessons_of(9, 0)
    with opened(folder, (lessons,), tmp_path / "work", True) as teacher:
        assert teacher.logits(batch_of(lessons, [0, 8])).dtype == torch.bfloat16
    sizes = [size for _, size in files(tmp_path / "work").values()]
    assert len(sizes) == 3  # batches
    assert 9 * S * HIDDEN * 2 < sum(sizes) < 9 * S * HIDDEN * 2 + 3 * 500


def test_a_finished_walk_is_used_again(olmoe: Path, tmp_path: Path) -> None:
    train, held_out = lessons_of(9, 0), lessons_of(3, 1)
    batch, seen, work = batch_of(train, [1, 7]), [], tmp_path / "work"

    def ask(parts: Sequence[Lessons], **more: object) -> Tensor:
        seen.clear()
        with opened(olmoe, parts, work, True, progress=lambda *now: seen.append(now), **more) as teacher:
            return teacher.logits(batch)

    first = ask((train, held_out))
    assert seen == [("walk teacher", n, zoo.LAYERS) for n in range(1, zoo.LAYERS + 1)]
    before = files(work)
    assert torch.equal(ask((train, held_out)), first)
    assert not seen and files(work) == before
    for parts, more in (((train, lessons_of(3, 2)), {}), ((train, held_out), {"dtype": "bfloat16"})):
        ask((train, held_out))
        ask(parts, **more)
        assert len(seen) == zoo.LAYERS, "of other text, or in another dtype"
        assert len(list(work.iterdir())) == 1, "of what is not used any more nothing is left"
    ask((train, held_out))
    (path := next(work.rglob("000001.safetensors"))).write_bytes(path.read_bytes()[:100])
    assert torch.equal(ask((train, held_out)), first)
    assert len(seen) == zoo.LAYERS, "damaged"


def test_an_interrupted_walk_goes_on(olmoe: Path, tmp_path: Path) -> None:
    lessons, seen = lessons_of(9, 0), []

    class Killed(BaseException):
        pass

    def kill(what: str, done: int, total: int) -> None:
        if done == 2:
            raise Killed

    with opened(olmoe, (lessons,), tmp_path / "undisturbed", True) as teacher:
        expected = teacher.logits(batch_of(lessons, [0, 5, 8]))
    with pytest.raises(Killed), opened(olmoe, (lessons,), tmp_path / "work", True, progress=kill):
        raise AssertionError("opened")
    with opened(olmoe, (lessons,), tmp_path / "work", True, progress=lambda *now: seen.append(now[1])) as teacher:
        assert torch.equal(teacher.logits(batch_of(lessons, [0, 5, 8])), expected)
    assert seen == [3, 4]


def test_only_sequences_that_are_asked_for_are_walked(olmoe: Path, tmp_path: Path) -> None:
    train, held_out = lessons_of(9, 0), lessons_of(3, 1)
    twice = Lessons(*(np.concatenate([x, x]) for x in (train.ids, train.labels, train.mask)), "twice")
    with opened(olmoe, (twice, held_out), tmp_path, True, indices=([4, 13, 6], None)) as teacher:
        assert teacher.logits(batch_of(twice, [15, 4])).shape == (2, S, zoo.VOCAB)
        assert teacher.logits(batch_of(held_out, [0, 1, 2])).shape == (3, S, zoo.VOCAB)
        with pytest.raises(AssertionError, match="not walked over this sequence"):
            teacher.logits(batch_of(train, [4, 5]))
    assert len(files(tmp_path)) == 2  # 2 different + 3 sequences are two batches of four


def test_memory_decides(olmoe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lessons = lessons_of(2, 0)
    skeleton = Skeleton(olmoe, device="cpu")
    caplog.set_level("INFO", "understudy")
    for beside, expected in ((0, Resident), (PLENTY, Streamed), (psutil.virtual_memory().total, Streamed)):
        with open_teacher(skeleton, (lessons,), beside_bytes=beside, work=tmp_path) as teacher:
            assert type(teacher) is expected
        assert ("do not fit together" in caplog.text) == (expected is Streamed)
    assert all(tensor.is_meta for tensor in skeleton.model.state_dict().values())  # it is gone with the context


def test_a_disk_too_small(olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lessons, work = lessons_of(9, 0), tmp_path / "work"
    needed = 2 * 9 * S * HIDDEN * 4
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(OutputError, match=r"27\.65 KB are needed for the teacher's hidden states, 27\.65 KB are free"):
        with opened(olmoe, (lessons,), work, True):
            pass
    assert not work.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    with opened(olmoe, (lessons,), work, True):
        pass


def test_a_disk_that_fills_up(olmoe: Path, tmp_path: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # writing fails as on a full disk
    try:
        with pytest.raises(OutputError, match=r"work/teacher-\w+\.of-1/part-0/.*cannot be written"):
            with opened(olmoe, (lessons_of(9, 0),), tmp_path / "work", True):
                pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_teachers_that_cannot_be(tmp_path: Path) -> None:
    lessons = lessons_of(2, 0)
    folder = small.model_folder(tmp_path / "classifier", "openai_privacy_filter")
    with pytest.raises(UnsupportedModelError, match="has no language head"), opened(folder, (lessons,), tmp_path, True):
        pass
    model = zoo.tiny_model("olmoe")
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)
    model.save_pretrained(tmp_path / "overflows")
    batch = batch_of(lessons, [0, 1])
    for streamed in (False, True):
        with opened(tmp_path / "overflows", (lessons,), tmp_path / "work", streamed) as teacher:
            with pytest.raises(NumericError, match=r"overflows.*NaN"):
                teacher.logits(batch)


SCRIPT = """
import sys
from pathlib import Path
import numpy as np, torch
from torch.utils.data import default_collate
from understudy.processes import join_processes
from understudy.skeleton import Skeleton
from understudy.training import hidden
from understudy.training.lessons import Lessons
from understudy.training.teacher import open_teacher

folder, work, out, *texts = map(Path, sys.argv[1:])
torch.set_num_threads(1)
train, held_out = (Lessons(**np.load(text), digest=text.name) for text in texts)
hidden._WALKED_TOKENS = 4 * train.ids.shape[1]
processes = join_processes(torch.device("cpu"))
layers = []


def ask(work, parts):
    layers.clear()
    with open_teacher(Skeleton(folder, device="cpu"), parts, beside_bytes=0, work=work, processes=processes,
                      progress=lambda what, done, total: layers.append(done), streamed=True) as teacher:
        batches = [default_collate([part[row] for row in range(len(part))]) for part in parts]
        return torch.cat([teacher.logits(batch) for batch in batches])


np.save(out.with_suffix(f".{processes.rank}.npy"), ask(work, (train, held_out)).numpy())
assert layers == [1, 2, 3, 4], layers
ask(work, (train, held_out))
assert layers == [], layers
ask(work.with_name("few"), (held_out,))  # one batch for two processes
free = 0 if processes.rank else 1 << 60  # a process that decides by itself would leave the other waiting
hidden.shutil.disk_usage = lambda _: type("Usage", (), {"free": free})
try:
    ask(work.with_name("none"), (train,))
except hidden.OutputError as error:
    assert "are needed" in str(error)
else:
    raise AssertionError("ran")
print(f"rank {processes.rank} of {processes.world} done", flush=True)
torch.distributed.destroy_process_group()
"""


def test_two_processes_walk_a_half_each(olmoe: Path, tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(SCRIPT)
    train, held_out, texts = lessons_of(13, 0), lessons_of(3, 1), [tmp_path / "train.npz", tmp_path / "held_out.npz"]
    for lessons, text in zip((train, held_out), texts, strict=True):
        np.savez(text, ids=lessons.ids, labels=lessons.labels, mask=lessons.mask)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += map(str, (tmp_path / "run.py", olmoe, tmp_path / "two", tmp_path / "logits", *texts))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rank 0 of 2 done" in done.stdout and "rank 1 of 2 done" in done.stdout
    again: list[int] = []
    logits = {}
    for name in ("one", "two"):  # the second goes on with what the two processes left
        with opened(olmoe, (train, held_out), tmp_path / name, True, progress=lambda *now: again.append(now[1])) as t:
            logits[name] = torch.cat([t.logits(batch_of(x, range(len(x)))) for x in (train, held_out)])
    assert again == [1, 2, 3, 4]
    for other in (logits["two"].numpy(), *(np.load(tmp_path / f"logits.{rank}.npy") for rank in range(2))):
        assert np.array_equal(logits["one"].numpy(), other)
    parts = sorted(path.name for path in next((tmp_path / "two").iterdir()).iterdir())
    assert parts == ["part-0", "part-1"]
