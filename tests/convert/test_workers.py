"""run_tasks(): errors of tasks, and of what makes them, reach the caller."""

from __future__ import annotations

import threading

import pytest

from diffquant.convert.workers import run_tasks


@pytest.mark.parametrize("workers", [1, 3])
def test_every_task_runs_and_so_do_those_it_returns(workers):
    done = []

    def task(name, *more):
        def run():
            done.append(name)
            return [task(one) for one in more]

        return run

    run_tasks([task("a", "b", "c"), task("d")], workers)
    assert sorted(done) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_of_a_task_is_raised_and_ends_the_others(workers):
    def fail():
        raise ValueError("task")

    before = threading.active_count()
    with pytest.raises(ValueError, match="task"):
        run_tasks([fail, *([list] * 50)], workers)
    assert threading.active_count() == before


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_while_tasks_are_made_is_raised(workers):
    def tasks():
        yield list
        raise ValueError("making")

    with pytest.raises(ValueError, match="making"):
        run_tasks(tasks(), workers)
