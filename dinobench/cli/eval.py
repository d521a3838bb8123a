"""`dinobench eval --suite S CKPT|RUN...`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dinobench.cli.foreign import AllowPartial, Arch, CheckpointKey, NumHeads

if TYPE_CHECKING:
    from dinobench.evaluate import Evaluation, Failure
    from dinobench.reporter import Reporter
    from dinobench.results import Result
    from dinobench.runs import RunFolder
    from dinobench.tracking import Store
    from suites.suite import Suite


def run_evaluation(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(
            metavar="CKPT|RUN|pixels...",
            help="Checkpoint files; a run folder means all it has kept; pixels or pixels:SIDE is no network, the "
            "images themselves.",
        ),
    ],
    suite: Annotated[list[str], typer.Option(help="Suite name or file; repeat it, or separate with commas.")],
    data: Annotated[str | None, typer.Option(help="Data set in place of the suite's own.")] = None,
    output: Annotated[Path, typer.Option(help="Where results of a checkpoint outside a run folder go.")] = Path("runs"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Seed of draws and bootstrap.")] = 0,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Follow one run folder: evaluate each checkpoint as it comes, until it ends."),
    ] = False,
    checkpoint_key: CheckpointKey = "teacher",
    arch: Arch = None,
    num_heads: NumHeads = None,
    allow_partial: AllowPartial = False,
    track: Annotated[bool, typer.Option("--track/--no-track", help="Log new results to MLflow.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure suites on checkpoints. What was measured before is read from the stored results.

    Several of these commands may work on one run: they divide it. With --watch the exit code is 0 when the run
    finished, and 3 when it ended otherwise. --json prints the result, or a list of results when several suites or
    checkpoints are given. Under torchrun the ranks divide the images of each feature pass.
    """
    from dinobench.evaluate import Evaluation
    from dinobench.loading import Loading
    from dinobench.reporter import Reporter
    from dinobench.runs import RunFolder
    from pretrain.errors import UsageError
    from pretrain.models.pixels import is_pixels
    from suites.ranks import led
    from suites.suite import load_suite

    reporter = Reporter()
    suites = [load_suite(name) for name in split_names(suite)]
    loading = Loading(checkpoint_key, arch, num_heads, allow_partial)
    settings = Evaluation(output=output, data=data, device=device, seed=seed, loading=loading)
    runs = [path for path in checkpoints if RunFolder(path).exists and not is_pixels(path)]
    if watch and (len(checkpoints) != 1 or not runs):
        raise UsageError("--watch follows one run folder (it has a run.json): give that alone, one command per run")
    with led(device) as leads:
        if leads:
            _evaluate(checkpoints, runs, suites, settings, reporter, watch=watch, track=track, as_json=as_json)


def _evaluate(
    checkpoints: list[Path],
    runs: list[Path],
    suites: list[Suite],
    settings: Evaluation,
    reporter: Reporter,
    *,
    watch: bool,
    track: bool,
    as_json: bool,
) -> None:
    """Measure and print.

    Raises:
        typer.Exit: with 3, something was not measured or a watched run did not finish.
    """
    from dinobench.evaluate import evaluate, evaluate_all
    from dinobench.runs import RunFolder, now

    results, shown, failures, advice = [], [], [], ""
    for path in checkpoints:
        if path in runs:
            done, failed, advice = _evaluate_run(RunFolder(path), suites, settings, reporter, watch=watch, track=track)
            shown += _print_curve(path.absolute().name, done, as_json)
        else:
            began = now()
            if len(checkpoints) == 1:
                done, failed = evaluate(path, suites, settings, reporter.say)
            else:  # the others go on where one cannot be read
                done, failed = evaluate_all([path], suites, settings, reporter.say)
            if track:  # only what is new: MLflow takes seconds to import, and features may come from the cache
                _track(path, [result for result in done if result.created >= began], settings.output, reporter)
            shown += done
        results += done
        failures += failed
    _print(results if as_json else shown, as_json, single=len(checkpoints) * len(suites) == 1 and not runs)
    for (checkpoint, reason), names in _by_reason(failures).items():
        reporter.warn(f"not measured: {', '.join(names)} on {checkpoint}: {reason}")
    if advice:
        reporter.warn(advice)
    if failures or advice:
        raise typer.Exit(3)


def _by_reason(failures: list[Failure]) -> dict[tuple[Path, str], list[str]]:
    """Suites by what they have in common: a checkpoint that cannot be read fails all of them."""
    found: dict[tuple[Path, str], list[str]] = {}
    for failure in failures:
        found.setdefault((failure.checkpoint, failure.reason), []).append(failure.suite)
    return found


def _evaluate_run(
    run: RunFolder, suites: list[Suite], settings: Evaluation, reporter: Reporter, *, watch: bool, track: bool
) -> tuple[list[Result], list[Failure], str]:
    """Results and failures of a run, and what to do when a watched run did not finish."""
    from dinobench.tracking import tracking_uri
    from dinobench.watch import evaluate_run
    from dinobench.watch import watch as follow

    log = _Log(run.path, run, tracking_uri(run.path.parent), reporter)
    record = log if track else (lambda result: None)
    try:
        if not watch:
            return *evaluate_run(run, suites, settings, reporter.say, record), ""
        watched = follow(run, suites, settings, reporter.say, record)
    finally:
        log.say_links()
    return watched.results, watched.failures, watched.advice


def split_names(values: list[str]) -> list[str]:
    """`--suite a,b --suite c` -> a, b, c; each once, in order."""
    from pretrain.errors import UsageError

    names = list(dict.fromkeys(name.strip() for value in values for name in value.split(",") if name.strip()))
    if not names:
        raise UsageError("--suite needs a name; `dinobench ls suites` lists them")
    return names


def _print(results: list[Result], as_json: bool, *, single: bool) -> None:
    from dinobench.cli import report
    from dinobench.cli.output import print_json, print_text

    documents = [result.document() for result in results]
    if as_json:
        if documents or not single:
            print_json(documents[0] if single else documents)
        return
    for checkpoint in dict.fromkeys(result.checkpoint for result in results):
        own = [result for result in results if result.checkpoint == checkpoint]
        report.print_results(own, f"{checkpoint}, scores in percent")
        stored = [result.suite for result in own if result.from_cache]
        if stored:
            print_text(f"from the cache: {', '.join(stored)}")


def _print_curve(run: str, results: list[Result], as_json: bool) -> list[Result]:
    """Headline scores of a run by training step, one row per checkpoint; gives the last ones, to be shown in full."""
    from dinobench.cli.output import print_table
    from dinobench.cli.report import last_results
    from dinobench.entries import number

    if as_json or not results:
        return []
    columns = {result.suite: f"{result.suite_name} {result.headline}" for result in results}
    rows: dict[tuple[int, int], dict[str, str]] = {}
    for result in results:
        facts = result.provenance
        at = int(facts.get("step") or 0), int(facts.get("images_seen") or 0)
        rows.setdefault(at, {})[result.suite] = number(result.score)
    cells = [
        [str(step), str(images), *(rows[step, images].get(s, "-") for s in columns)] for step, images in sorted(rows)
    ]
    print_table(f"{run}, scores in percent", ["step", "images seen", *columns.values()], cells)
    return last_results(results)


class _Log:
    """Logs results to MLflow one by one, what is there already not again. A store that fails is told of once."""

    def __init__(self, root: Path, run: RunFolder | None, uri: str, reporter: Reporter):
        self.root, self.run, self.uri, self._reporter = root, run, uri, reporter
        self._store: Store | None = None
        self._failed = False

    def __call__(self, result: Result) -> None:
        from dinobench import mirror, tracking  # MLflow takes seconds to import: not at all when there is no result

        if self._failed:
            return
        try:
            if self._store is None:
                self._store = tracking.connect(self.uri)
                self._reporter.say(f"logging to {tracking.masked(self.uri)}")
            mirror.log_result(self._store, self.root, result, self.run)
        except tracking.TrackingUnavailable as error:
            self._failed = True
            again = f"dinobench runs sync {self.run.path if self.run else f'--output {self.root}'}"
            self._reporter.warn(
                f"not logged to MLflow: {error}; the result is in its file all the same; `{again}` logs it later"
            )

    def say_links(self) -> None:
        """Where to look at what was logged, if anything was."""
        if self._store is not None and not self._failed:
            from dinobench.cli.links import say_links

            output = self.run.path.parent if self.run else self.root
            say_links(self._store.links(""), self.uri, output, self._reporter.say)


def _track(checkpoint: Path, results: list[Result], output: Path, reporter: Reporter) -> None:
    """Log the new results of a checkpoint file."""
    from dinobench.runs import run_of_checkpoint
    from dinobench.tracking import tracking_uri
    from pretrain.models.pixels import is_pixels

    run = None if is_pixels(checkpoint) else run_of_checkpoint(checkpoint)
    log = _Log(run.path if run else output, run, tracking_uri(run.path.parent if run else output), reporter)
    for result in results:
        log(result)
    log.say_links()
