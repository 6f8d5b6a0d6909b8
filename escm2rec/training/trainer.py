"""One training: a data set in, a run out, step by step on the ranks that there are."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from escm2rec.config import Config
from escm2rec.disk import telling_of_disk
from escm2rec.errors import ConfigError, DataError, RunError, StopError
from escm2rec.folder import MANIFEST, RUN_CONFIG, read_manifest, write_json
from escm2rec.objectives.objective import Phase, Stage
from escm2rec.paths import DataPath
from escm2rec.progress import Progress
from escm2rec.reader.batch import Batch
from escm2rec.reader.dataset import Dataset
from escm2rec.reader.reader import Reader
from escm2rec.sharding.managed import sharded_managed
from escm2rec.sharding.model import dense_parameters, whole_tables
from escm2rec.sharding.planner import plan_as_json, refuse_empty_shards, warn_of_uncut_columns
from escm2rec.sharding.runtime import Runtime, on_main
from escm2rec.training.agreement import Agreement, Clock, StopRequest, heeding_sigterm
from escm2rec.training.build import BaseRates, build_model, build_objective, shard
from escm2rec.training.calendar import Calendar
from escm2rec.training.checkpoint import (
    Checkpoints,
    checkpoint_of,
    damage,
    last_good_checkpoint,
    latest_checkpoint,
    load_checkpoint,
)
from escm2rec.training.copies import Copies
from escm2rec.training.divergence import Divergence
from escm2rec.training.metrics import MetricsLog, TrainingMetrics
from escm2rec.training.mlflow_log import MlflowLog
from escm2rec.training.optimizer import DenseOptimizer, TableSteps, combined_optimizer, rate_factor
from escm2rec.training.owner import Owner
from escm2rec.training.profile import Profile
from escm2rec.training.run import finish_run, go_on, last_record
from escm2rec.training.start import start
from escm2rec.training.step import Loss, StepOutput, TrainingModel
from escm2rec.training.validation import Best, Validation
from escm2rec.training.warm_start import take_from
from escm2rec.training.whole_tables import WholeTables

logger = logging.getLogger(__name__)


def train_one(
    config: Config,
    data: DataPath,
    out: Path,
    runtime: Runtime,
    resume: bool,
    overwrite: bool,
    half: int | None = None,
    propensities: Callable[[Owner], Path] | None = None,
    profiles: bool = False,
    warm_start: Path | None = None,
    copies: Copies | None = None,
) -> dict[str, Any]:
    """Train the config's objective on the training split of `data`, or a half of it, and leave a run at `out`; see `train`.

    `propensities` makes the logits of a given q, when the run folder is there.
    """
    dataset, source = on_main(runtime, lambda: start(config, data, out, resume, overwrite, warm_start))
    dataset = replace(dataset, half=half)
    with telling_of_disk(out, "start again with --resume"):
        owner = Owner.take(out, runtime)  # before a checkpoint is chosen, which another start could remove
        if copies is not None:
            copies.take(owner)
        trainer = Trainer(config, dataset, out, runtime, None if propensities is None else propensities(owner))
        trainer.keep_copy = None if copies is None else partial(copies.bring, owner)
        if source is not None:
            take_from(source, config, dataset.schema, out, trainer.module, trainer.optimizer, runtime)
        if resume:
            trainer.resume()
        result = trainer.train(owner, profiles)
        return result if copies is None else result | copies.finish(owner)


class Trainer:
    """One rank's training: model, optimizers, reader and where it stands."""

    def __init__(self, config: Config, dataset: Dataset, out: Path, runtime: Runtime, propensity_logits: Path | None = None) -> None:
        self.config, self.out, self.runtime = config, out, runtime
        training = config.training
        self.data = dataset.path
        self.rates = BaseRates.of(dataset.weighted_counts("train"))
        self.objective = build_objective(config.objective, self.rates.ctr)
        calibration = config.objective.propensity.calibration
        self.loss = Loss(self.objective, runtime.group, None if calibration == "none" else calibration, training.max_skipped_steps > 0)
        model = TrainingModel(
            build_model(dataset.schema, config.model, config.objective, self.rates, training.seed, training.in_bfloat16), self.loss
        )
        sharded = shard(model, dataset.schema, config, runtime, None if training.plan is None else Path(training.plan))
        self.module: DistributedModelParallel = sharded.module
        self.plan = {"world_size": runtime.world_size, **plan_as_json(sharded.plan)}
        if runtime.device.type == "cpu":
            refuse_empty_shards(self.plan["tables"])
        if runtime.is_main:
            warn_of_uncut_columns(self.plan["tables"])
        self.dense = DenseOptimizer(dense_parameters(self.module), training, runtime.group, lambda: self.loss.skipped)
        self.managed = {name: rows for tables in sharded_managed(self.module) for name, rows in tables.values()}
        self.table_steps = TableSteps(self.module, training.sparse_optimizer)
        whole = WholeTables(whole_tables(sharded), training, runtime.group)
        self.optimizer = combined_optimizer(self.module, whole, self.dense)
        self.learning_rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.reader = Reader(
            dataset,
            "train",
            training.global_batch_size,
            runtime.rank,
            runtime.world_size,
            seed=training.seed,
            lanes=training.shuffle_lanes,
            prefetch=training.prefetch_batches,
            decode_threads=training.decode_threads,
            pin_memory=runtime.device.type == "cuda",
            propensity_logits=propensity_logits,
        )
        self.calendar = Calendar(
            training.epochs * self.reader.num_steps, config.objective.propensity.calibration_every_steps if calibration != "none" else None
        )
        self.held_out = self._held_out_reader(dataset) if calibration != "none" else None
        self.validation = Validation(dataset, training, runtime) if training.evaluate_every_steps is not None else None
        self.best: Best | None = None
        self.is_measured = False  # the model as it is
        self.total_steps = self.calendar.total
        self.warm_up_steps = math.ceil(config.objective.propensity.warmup_fraction * self.total_steps)
        self.step = 0  # steps done, over all epochs; the reader is further ahead
        self.lifetime: list[list[float]] | None = None  # sums over all rows that trained, of each rank
        self.divergence = Divergence(out, runtime, training.max_skipped_steps)
        self.keep_copy: Callable[[], None] | None = None  # after each checkpoint, in its thread
        self.schema_hash, self.data_identity = dataset.schema.hash(), dataset.identity("train")

    def resume(self) -> None:
        """Go on from the last complete checkpoint that is not damaged, if there is one."""
        folder = last_good_checkpoint(self.out, self.runtime)
        if folder is None:
            return
        progress = load_checkpoint(folder, self.module, self.optimizer)
        if progress["data"] != self.data_identity:
            raise DataError(f"{folder} was trained on other rows than the training split holds now", "resume with the data set of the run")
        if progress["step"] > self.total_steps:
            raise ConfigError(f"{folder} is past the {self.total_steps} steps of training.epochs", "ask for as many epochs or more")
        self.step, self.warm_up_steps = progress["step"], progress["warm_up_steps"]
        self.divergence.skipped = progress.get("skipped_steps", 0)  # checkpoints of before have no count
        self.is_measured = progress.get("is_measured", False)
        self.lifetime = progress.get("lifetime")
        if (best := progress.get("best")) is not None and best["metric"] == self.config.training.keep_best:
            self.best = self._whole(Best(**best))

    def _whole(self, best: Best) -> Best | None:
        """None, and a warning, when its checkpoint is damaged or gone: a better one may have taken its place, and been damaged."""
        said = damage(checkpoint_of(self.out, best.step), self.runtime) if best.step != self.step else None
        if said is not None and self.runtime.is_main:
            logger.warning("the best by %s is looked for anew, the checkpoint of step %d is not whole: %s", best.metric, best.step, said)
        return best if said is None else None

    @property
    def is_over(self) -> bool:
        """Whether all steps are done, or so many measurements found nothing better that training stops early."""
        patience = self.config.training.early_stopping
        waited = self.best.since if self.best is not None else 0
        return self.step == self.total_steps or (patience is not None and waited >= patience)

    def train(self, owner: Owner, profiles: bool = False) -> dict[str, Any]:
        """Train to the end, log, save, and finish the run, with a profile if asked for; RunError as soon as it has another owner."""
        tells = self.config.training.mlflow is not None and self.runtime.is_main
        finished = on_main(self.runtime, self._finished) if self.is_over else None
        if finished is not None and (self.best is not None or "best" not in finished):  # else its checkpoint is not whole
            with MlflowLog(owner, self.config) if tells else nullcontext():  # which may lack some of it
                self._tell_finished(profiles)
            return finished
        if self.runtime.is_main:
            ranks = f"{self.runtime.world_size} rank(s), {self.runtime.device.type}"
            logger.info("trains steps %d to %d on %s", self.step + 1, self.total_steps, ranks)
        on_main(self.runtime, lambda: self._prepare(owner))
        if self.objective.estimator.weighs and not self.objective.given and self.warm_up_steps >= self.total_steps:
            logger.warning(
                "all %d steps are warm-up: the base CTR stays the propensity; train on more, or in smaller batches", self.total_steps
            )
        if self.calendar.never_calibrates:
            logger.warning(
                "no step calibrates: the %d steps of training end before the first one; lower propensity.calibration_every_steps (%d)",
                self.calendar.training,
                self.calendar.every,
            )
        with MlflowLog(owner, self.config) if tells else nullcontext() as mlflow:
            return self._train(owner, profiles, mlflow)

    def _train(self, owner: Owner, profiles: bool, mlflow: MlflowLog | None) -> dict[str, Any]:
        """The steps that are left, and the finished run; what is worth knowing of it."""
        started, first_step = time.perf_counter(), self.step
        record: dict[str, Any] = {}
        rows_left = self._rows(self.total_steps) - self._rows(self.step)
        with (
            MetricsLog(owner, self.runtime, first_step, mlflow) as log,
            Progress("train", rows_left, self.runtime.is_main) as progress,
            Checkpoints(owner, self.config.training.keep_checkpoints, self.runtime, self.keep_copy) as checkpoints,
            heeding_sigterm() as request,
            self._profile() if profiles and self.step < self.total_steps else nullcontext() as profile,
        ):
            for record in self.records(checkpoints, request, profile):
                log.write(record)
                losses = [f"{name} {value:.4f}" for name, value in record.items() if name.startswith("loss_")]
                progress.add(record["rows"], f"step {record['step']} of {self.total_steps}, {' '.join(losses)}")
        seconds = time.perf_counter() - started
        if self.step < self.total_steps and self.best is not None and self.runtime.is_main:
            logger.info("stopped early: since step %d no better %s was found", self.best.step, self.best.metric)
        checkpoint = latest_checkpoint(self.out) if self.best is None else checkpoint_of(self.out, self.best.step)
        assert checkpoint is not None
        rows = self._rows(self.step) - self._rows(first_step)
        summary = {
            "objective": self.objective.kind,
            "steps": self.step,
            "planned_steps": self.total_steps,
            "skipped_steps": self.divergence.skipped,
            "epochs": self.config.training.epochs,
            "world_size": self.runtime.world_size,
            "checkpoint": str(checkpoint.relative_to(self.out)),
            **({"best": self.best.as_json(), "stopped_early": self.step < self.total_steps} if self.best is not None else {}),
            "base_ctr": self.rates.ctr,
            "base_cvr": self.rates.cvr,
            "schema_hash": self.schema_hash,
            "data": str(self.data.resolve() if isinstance(self.data, Path) else self.data),
            "seconds": round(seconds, 3),
            "rows_per_s": round(rows / seconds, 1),
            "last_metrics": record or on_main(self.runtime, lambda: last_record(self.out)),
        }
        on_main(self.runtime, lambda: self._finish(owner, summary))
        return {"run": str(self.out), **summary}

    def records(
        self, checkpoints: Checkpoints | None = None, request: StopRequest | None = None, profile: Profile | None = None
    ) -> Iterator[dict[str, Any]]:
        """Train step by step from where it stands; yield records of metrics as they are made, those up to a checkpoint before it.

        StopError when `request` was asked of any rank, after a checkpoint, a step or two later.
        """
        training = self.config.training
        agreement, clock = Agreement(2), Clock(training.checkpoint_every_minutes if self.runtime.is_main else None)
        metrics = TrainingMetrics(self.runtime, self.objective.estimator.weighs, self.lifetime, self.managed)
        pipeline = TrainPipelineSparseDist(self.module, self.optimizer, self.runtime.device, execute_all_batches=True)
        divergence, records = self.divergence, deque[Future[dict[str, Any]]]()
        batches = divergence.watch(self._batches(), self.step)
        stops = wants = False
        while not self.is_over:
            stops_now, is_due = agreement.exchange(request is not None and request.asked, clock.is_due())
            calibrates = self.calendar.calibrates(self.step)
            self._begin_step(calibrates)
            output = pipeline.progress(batches)
            self.step += 1
            try:
                divergence.add(self.step, output)
            except RunError:
                yield from (record.result() for record in records)  # the last before it are the ones to look at
                raise
            if not calibrates and not output.skipped:
                metrics.add(output)
                self.is_measured = False
            measures = not calibrates and self._is_to_be_measured()
            every = training.checkpoint_every_steps
            stops |= stops_now
            wants |= stops or is_due or (every is not None and self.step % every == 0)
            if wants or measures or self.is_over:
                divergence.look()
            found = self._measure(pipeline) if measures else {}
            wants |= self.is_over or (measures and self.best is not None and self.best.step == self.step)
            saves = wants and not self.dense.holds_gradients
            if measures or (metrics.steps and (saves or self.step % training.log_every_steps == 0)):
                epoch = (self.calendar.trained(self.step) - 1) // self.reader.num_steps
                told = {"skipped_steps": divergence.skipped, **self._rates(), **self._calibration(), **found}
                records.append(metrics.record(self.step, epoch, told))
                self.lifetime = metrics.lifetime
            while records and (saves or records[0].done()):
                yield records.popleft().result()
            if checkpoints is not None:
                self._keep(checkpoints, saves, stops and not self.is_over)
            wants &= not saves
            if profile is not None:
                profile.step()
        metrics.close()
        agreement.close()
        if self.validation is not None:
            self.validation.close()

    def _keep(self, checkpoints: Checkpoints, saves: bool, stops: bool) -> None:
        """Save, if it is time; StopError when that was the last step of one that is asked to end."""
        checkpoints.check()
        if saves:
            progress = {"step": self.step, "data": self.data_identity, "warm_up_steps": self.warm_up_steps}
            progress["skipped_steps"] = self.divergence.skipped
            progress["is_measured"] = self.is_measured
            progress["lifetime"] = self.lifetime
            if self.best is not None:
                progress["best"] = self.best.as_json()
            checkpoints.save(self.step, progress, self.module, self.optimizer)
        if saves and stops:
            checkpoints.wait()
            raise self._stopped()

    def _stopped(self) -> StopError:
        error = StopError(
            f"stopped by SIGTERM after step {self.step} of {self.total_steps}; its checkpoint is whole", "--resume goes on from it"
        )
        error.told_by_rank_0 = not self.runtime.is_main
        return error

    def _profile(self) -> Profile:
        return Profile(self.out, self.runtime, self.total_steps - self.step, self.reader.num_rows / self.reader.num_steps)

    def _begin_step(self, calibrates: bool) -> None:
        """Tell all that act in the next step what it is; a function of the step alone."""
        trained = self.calendar.trained(self.step)
        phase: Phase = "calibration" if calibrates else self.objective.phase(trained)
        self.loss.stage = Stage(phase, self.step < self.warm_up_steps, self.step / self.total_steps)
        self.dense.expect(None if calibrates else trained, self.step + 1 == self.total_steps)
        self.table_steps.expect(trained - self.divergence.skipped)
        for rows in self.managed.values():
            rows.gives = not calibrates
        factor = rate_factor(self.step, self.total_steps, self.config.training)
        for group, rate in zip(self.optimizer.param_groups, self.learning_rates, strict=True):
            group["lr"] = rate * factor

    def _is_to_be_measured(self) -> bool:
        """Whether the model is, after the step that was done last; not again where no step has moved it since."""
        every = self.config.training.evaluate_every_steps
        if every is None or self.is_measured:
            return False
        return self.step == self.total_steps or self.calendar.trained(self.step) % every == 0

    def _measure(self, pipeline: TrainPipelineSparseDist[Batch, StepOutput]) -> dict[str, float]:
        """The figures of the validation split, under their names in records; what is best is known after it."""
        assert self.validation is not None
        pipeline.detach()  # `progress` attaches the model again, with the batches that are on their way
        with self.dense.averaged():
            found = self.validation.measure(self.module, self.optimizer, self.step)
        self.is_measured = True
        if (metric := self.config.training.keep_best) is not None:
            self.best = on_main(self.runtime, lambda: Best.after(self.best, metric, self.step, found))
        if self.runtime.is_main:
            aucs = ", ".join(f"{name} {value:.4f}" for name, value in found.items() if name.endswith("_auc"))
            logger.info("step %d: validation %s%s", self.step, aucs, self._against_best(found))
        return {f"validation_{name.removeprefix('window_')}": value for name, value in found.items()}

    def _against_best(self, found: dict[str, float]) -> str:
        if self.best is None:
            return ""
        metric = self.best.metric
        return f"; {metric} {found[metric]:.5f}, " + (
            "the best so far" if self.best.since == 0 else f"best {self.best.value:.5f} after step {self.best.step}"
        )

    def _prepare(self, owner: Owner) -> None:
        owner.check()  # to find and load a checkpoint takes long: what a later start wrote meanwhile stays
        go_on(self.out, self.step)
        write_json(self.out / RUN_CONFIG, self.config.model_dump(mode="json"))  # what may change on resumption may have
        write_json(self.out / "plan.json", self.plan)

    def _finish(self, owner: Owner, summary: dict[str, Any]) -> None:
        owner.check()
        finish_run(self.out, summary)

    def _tell_finished(self, profiles: bool) -> None:
        if not self.runtime.is_main:
            return
        early = self.step < self.total_steps
        how = "stopped early" if early else "was finished"
        more = "a higher training.early_stopping" if early else "more training.epochs"
        logger.warning(
            "%s %s after step %d of %d: nothing was done; %s would train further", self.out, how, self.step, self.total_steps, more
        )
        if profiles:
            logger.warning("nothing was trained, so there is nothing to profile")

    def _finished(self) -> dict[str, Any] | None:
        """What the finished run says of itself; None when it is not finished."""
        if not (self.out / MANIFEST).exists():
            return None
        manifest = read_manifest(self.out, "run")
        return {"run": str(self.out), **{name: value for name, value in manifest.items() if name not in ("kind", "version")}}

    def _batches(self) -> Iterator[Batch]:
        """All batches still to come: those that train, epoch after epoch, and among them those that calibrate, round and round."""
        first_epoch, step = divmod(self.calendar.trained(self.step), self.reader.num_steps)
        first_row = self.reader.row_at(step)
        epochs = range(first_epoch, self.config.training.epochs)
        trains = chain.from_iterable(self.reader.epoch(epoch, first_row if epoch == first_epoch else 0) for epoch in epochs)
        if self.held_out is None:
            return trains
        calibrates = self._held_out_batches(self.held_out)
        return (next(calibrates if self.calendar.calibrates(step) else trains) for step in range(self.step, self.total_steps))

    def _held_out_batches(self, reader: Reader) -> Iterator[Batch]:
        start = (self.step - self.calendar.trained(self.step)) % reader.num_steps
        return chain.from_iterable(reader.epoch(0, reader.row_at(start) if turn == 0 else 0) for turn in count())

    def _held_out_reader(self, dataset: Dataset) -> Reader:
        size = self.config.training.global_batch_size
        return Reader(dataset, "validation", size, self.runtime.rank, self.runtime.world_size, seed=self.config.training.seed)

    def _rows(self, step: int) -> int:
        """Rows that have trained when so many steps are done."""
        epochs, steps = divmod(self.calendar.trained(step), self.reader.num_steps)
        return epochs * self.reader.num_rows + self.reader.row_at(steps)

    def _rates(self) -> dict[str, float]:
        """Learning rates of the last step, and the norm that its gradients had before they were clipped, for the record."""
        training, norm = self.config.training, self.dense.gradient_norm
        factor = rate_factor(self.step - 1, self.total_steps, training)
        rates = {"sparse": training.sparse_learning_rate, "dense": training.dense_learning_rate}
        found = {f"{name}_learning_rate": rate * factor for name, rate in rates.items()}
        return found if norm is None else {**found, "dense_gradient_norm": float(norm)}

    def _calibration(self) -> dict[str, float]:
        """The propensity's slope and shift, for the record."""
        if self.loss.calibrates is None:
            return {}
        slope, shift = self.loss.calibration.tolist()
        return {"propensity_slope": slope, "propensity_shift": shift}
