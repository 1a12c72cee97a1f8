"""The cache of plans: what was kept is taken, whatever is damaged is not, and threads do not build the same plan twice."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from foldkv.optimize.plan_cache import PlanCache


def test_what_was_kept_is_taken_and_what_is_damaged_is_not(tmp_path: Path) -> None:
    cache, plan, out = PlanCache(tmp_path / "cache"), tmp_path / "plan", tmp_path / "out"
    plan.write_bytes(b"the plan")
    assert cache.take("k", out) is None and not out.exists()
    cache.keep("k", plan, {"layers": 3})
    assert cache.take("k", out) == {"layers": 3} and out.read_bytes() == b"the plan"
    assert cache.take("other", out) is None
    assert {path.name for path in cache.folder.iterdir()} == {"k.plan", "k.json"}
    for name, content in (("k.plan", b"the plam"), ("k.plan", b""), ("k.json", b"{"), ("k.json", b"[]")):
        cache.keep("k", plan, {"layers": 3})
        (cache.folder / name).write_bytes(content)
        assert PlanCache(tmp_path / "cache").take("k", out) is None
    cache.keep("k", plan, {"layers": 4})
    assert cache.take("k", out) == {"layers": 4}


def test_a_cache_that_cannot_be_written_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    (tmp_path / "plan").write_bytes(b"x")
    cache = PlanCache(tmp_path / "cache")
    cache.keep("k", tmp_path / "plan", {})
    assert cache.take("k", tmp_path / "out") is None


def test_a_thread_that_wants_a_plan_that_is_being_built_waits_for_it(tmp_path: Path) -> None:
    built, inside, most, counting = list[int](), [0], [0], threading.Lock()

    def one(number: int) -> None:
        cache, plan = PlanCache(tmp_path / "cache"), tmp_path / f"{number}.plan"
        with cache.alone("k"):
            with counting:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            if cache.take("k", plan) is None:
                built.append(number)
                plan.write_bytes(b"plan")
                cache.keep("k", plan, {})
            with counting:
                inside[0] -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(8)))
    assert len(built) == 1 and most[0] == 1
