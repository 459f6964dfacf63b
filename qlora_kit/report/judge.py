"""One sentence on a loss curve: improving, flat, or overfitting since step N.

Evaluation losses are judged where there are at least three, since the training loss of a model that overfits goes on
falling. Without them the training losses are, averaged over ten stretches of the run. A difference counts if it is
above 1 % of the loss and, between averages, above four standard errors of the noisiest one: of ten averages around the
same value the lowest already lies one and a half standard errors below it.
"""

import math
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from qlora_kit.report.curve import curve, finite
from qlora_kit.report.folder import RunFolder

TOLERANCE = 0.01
STRETCHES = 10
WATCHED = 20
"""Steps of a stretch whose mean training loss is watched."""
_SILENT = 3
"""Steps in a row without any gradient."""


class _Trend(NamedTuple):
    """What is judged: the points, and by how much two must differ."""

    name: str
    points: list[tuple[float, float]]
    margin: float


class Best(NamedTuple):
    """The best evaluation of a run."""

    step: float
    loss: float
    last_step: float
    """At which training ended: what was trained is of this step."""
    last_loss: float
    """Of the last evaluation."""


class Explosion(NamedTuple):
    """Where the training loss has exploded: the step that told, what it was before (the mean of the lowest stretch, or
    the loss of the first step), and the mean of the last stretch."""

    step: float
    before: float
    after: float
    since_first: bool = False

    def __str__(self) -> str:
        before, after = _said(self.before), _said(self.after)
        means = f"from {before} to {after} (means of {WATCHED} steps)"
        if self.since_first:
            means = f"from {before} at the first step to {after} (mean of {WATCHED} steps)"
        return f"The training loss exploded by step {self.step:,.0f}: it rose {means}; a lower train.lr may help."


class LossWatch:
    """Tells, once, when a training loss explodes, from its losses as they come.

    It has when the mean of the last 20 is twice that of the lowest 20 in a row before them, a nat above it (so that the
    losses of rows long learnt, which are nearly zero, may double), and by six standard errors of the noisier stretch:
    a lowest of many is low by chance. Until there is such a stretch the first loss stands for it, which is of the model
    as it started. It is of one step, whose rows may be easy: so it is three times that, two nats above it, and by six
    standard deviations of a step.
    """

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=WATCHED)
        self._first = math.inf
        self._lowest: tuple[float, float] | None = None
        self._seen = 0
        self.exploded: Explosion | None = None

    def see(self, step: float, loss: float) -> Explosion | None:
        """Take the loss of a step; the explosion if this is the step that tells of it."""
        if not self._seen:
            self._first = loss
        self._last.append(loss)
        self._seen += 1
        if self.exploded is not None or len(self._last) < WATCHED:
            return None
        mean, spread = fmean(self._last), stdev(self._last)
        error = spread / math.sqrt(WATCHED)
        is_early = self._seen < 2 * WATCHED
        if is_early and mean > max(3 * self._first, self._first + 2, self._first + 6 * spread):
            self.exploded = Explosion(step, self._first, mean, since_first=True)
            return self.exploded
        if self._lowest is not None:
            low, low_error = self._lowest
            if mean > max(2 * low, low + 1, low + 6 * max(error, low_error)):
                self.exploded = Explosion(step, low, mean)
                return self.exploded
        if self._seen % WATCHED == 0 and (self._lowest is None or mean < self._lowest[0]):
            self._lowest = mean, error
        return None


class GradientWatch:
    """Tells, once, that gradients have become zero, from their norms as they come: three in a row."""

    def __init__(self) -> None:
        self._since, self._count = 0.0, 0
        self._has_told = False

    def see(self, step: float, norm: float) -> str:
        """Take the norm of a step; the sentence if this is the step that tells, else ""."""
        if norm != 0:
            self._count = 0
            return ""
        self._since, self._count = (self._since if self._count else step), self._count + 1
        if self._count < _SILENT or self._has_told:
            return ""
        self._has_told = True
        return (
            f"The gradient has been zero since step {self._since:,.0f}: nothing more is learnt; unless the loss is "
            "zero as well, start again with a lower train.lr."
        )


def best_evaluation(rows: Sequence[dict[str, Any]]) -> Best | None:
    """Of the lowest evaluation losses the latest; None if there is none."""
    evaluated = finite(curve(rows, "eval_loss"))
    if not evaluated:
        return None
    step, loss = min(evaluated, key=lambda point: (point[1], -point[0]))
    trained = [row["step"] for row in rows if "loss" in row]
    return Best(step, loss, max([*trained, evaluated[-1][0]]), evaluated[-1][1])


def judge_curve(
    rows: Sequence[dict[str, Any]], kept: Collection[float] | None = None, left: float | None = None
) -> str:
    """One sentence that judges the losses in `rows` (rows of metrics.jsonl, in order of steps).

    With the steps whose parameters are `kept`, and the one whose parameters the run `left` as its result, it says as
    well what has become of the best evaluation.

    >>> judge_curve([{"step": s, "eval_loss": v} for s, v in ((10, 2.0), (20, 1.5), (30, 1.9))])
    'Overfitting since step 20: the evaluation loss has risen from 1.500 to 1.900.'
    """
    trend = _trend(rows)
    if not trend.points:
        verdict = "No loss has been recorded"
    elif len(trend.points) < 3:
        step, loss = trend.points[-1]
        verdict = f"Too few points to judge: the {trend.name} loss at step {step:,.0f} is {_said(loss)}"
    else:
        verdict = _verdict(trend, rows)
    best = best_evaluation(rows)
    if kept is not None and best is not None:
        verdict += f"; {_what_is_left(best, kept, left)}"
    lost = [row["step"] for row in rows if row.get("nonfinite")]
    if lost:
        steps = "1 step" if len(lost) == 1 else f"{len(lost):,} steps"
        verdict += f"; the loss was not finite at {steps}, first at step {lost[0]:,.0f}"
    return verdict + "."


def judge_run(run: RunFolder) -> str:
    """What there is to say of a run: whether it made the model worse, whether it got to its end, and its curve."""
    steps, planned = [row["step"] for row in run.rows if "loss" in row], run.plan.get("steps")
    early = ""
    if planned and steps and steps[-1] < planned:
        where = f"step {steps[-1]:,.0f} of {planned:,.0f}"
        early = f"Not finished: the last is {where}." if run.scores is None else f"Stopped early, at {where}."
    curve_sentence = judge_curve(run.rows, run.kept_steps, run.left_step)
    sentences = judge_scores(run.scores), early, judge_explosion(run.rows), curve_sentence
    return " ".join(sentence for sentence in sentences if sentence)


def judge_explosion(rows: Sequence[dict[str, Any]]) -> str:
    """A sentence where the training loss has exploded; "" elsewhere."""
    watch = LossWatch()
    for step, loss in finite(curve(rows, "loss")):
        watch.see(step, loss)
    return "" if watch.exploded is None else str(watch.exploded)


def judge_scores(scores: Mapping[str, Any] | None) -> str:
    """A sentence where training has made the model worse than its base on the held-out rows; "" elsewhere.

    >>> judge_scores({"base": {"loss": 2.489}, "adapter": {"loss": 4.227}})
    'Worse than the base on the held-out rows: a loss of 4.227 against 2.489.'
    """
    base, trained = ((scores or {}).get(kind, {}).get("loss") for kind in ("base", "adapter"))
    if base is None or trained is None or trained <= base:
        return ""
    return f"Worse than the base on the held-out rows: a loss of {_said(trained)} against {_said(base)}."


def _what_is_left(best: Best, kept: Collection[float], left: float | None) -> str:
    """Where the best evaluation's parameters are: in the run's result, in a checkpoint, or nowhere."""
    name, end = f"the best evaluation, {_said(best.loss)} at step {best.step:,.0f},", f"step {best.last_step:,.0f}"
    if best.step == left != best.last_step:
        return f"{name} is the run's result; training ended at {end}"
    if left not in (None, best.last_step, best.step):
        return f"{name} is not the run's result: that is step {left:,.0f}, and training ended at {end}"
    if best.step in kept:
        is_end = best.step == best.last_step
        return (
            f"{name} is the run's last and is kept"
            if is_end
            else f"{name} is kept as a checkpoint; training ended at {end}"
        )
    if best.last_step not in kept:
        return f"{name} is not kept, nor is the last"
    if best.last_loss - best.loss <= TOLERANCE * abs(best.loss):
        return f"{name} is not kept, but the last, {end}, is within 1 % of it"
    return f"{name} is not kept: only the last, {end}, is"


def _trend(rows: Sequence[dict[str, Any]]) -> _Trend:
    evaluated = finite(curve(rows, "eval_loss"))
    trained = finite(curve(rows, "loss"))
    if len(evaluated) >= 3 or not trained:
        lowest = min((abs(loss) for _, loss in evaluated), default=0.0)
        return _Trend("evaluation", evaluated, TOLERANCE * lowest)
    count = min(STRETCHES, len(trained) // 2) if len(trained) > 5 else len(trained)
    stretches = [trained[index * len(trained) // count : (index + 1) * len(trained) // count] for index in range(count)]
    losses = [[loss for _, loss in stretch] for stretch in stretches]
    noise = max((stdev(part) / math.sqrt(len(part)) for part in losses if len(part) > 1), default=0.0)
    points = [(stretch[-1][0], fmean(part)) for stretch, part in zip(stretches, losses, strict=True)]
    return _Trend("training", points, max(TOLERANCE * min(abs(loss) for _, loss in points), 4 * noise))


def _verdict(trend: _Trend, rows: Sequence[dict[str, Any]]) -> str:
    first, last = trend.points[0][1], trend.points[-1][1]
    best_step, best = min(trend.points, key=lambda point: point[1])
    fell = f"the {trend.name} loss fell from {_said(first)} to {_said(last)}"
    rose = f"the {trend.name} loss has risen from {_said(best)} to {_said(last)}"
    if last - best > trend.margin:
        overfits = trend.name == "evaluation" and not _training_rose(rows, best_step)
        return f"{'Overfitting' if overfits else 'Getting worse'} since step {best_step:,.0f}: {rose}"
    if first - last <= trend.margin:
        return f"Flat: the {trend.name} loss went from {_said(first)} to {_said(last)}"
    settled = _settled_since(trend)
    if settled is not None:
        return f"Improving, then flat since step {settled:,.0f}: {fell}"
    return f"Improving: {fell} and was still falling at the end"


def _training_rose(rows: Sequence[dict[str, Any]], since_step: float) -> bool:
    """Whether training got worse too after `since_step`: then the model diverges, and does not overfit."""
    trained = finite(curve(rows, "loss"))
    before = [loss for step, loss in trained if step <= since_step][-20:]
    after = [loss for step, loss in trained if step > since_step][-20:]
    return bool(before and after) and fmean(after) > fmean(before) * (1 + TOLERANCE)


def _settled_since(trend: _Trend) -> float | None:
    """The step since which every loss is within the margin of the last; None if those are below half of all."""
    last = trend.points[-1][1]
    near = 0
    while near < len(trend.points) and abs(trend.points[-1 - near][1] - last) <= trend.margin:
        near += 1
    return trend.points[-near][0] if near >= max(2, len(trend.points) / 2) else None


def _said(loss: float) -> str:
    return f"{loss:.3f}" if abs(loss) < 1e4 else f"{loss:.2e}"
