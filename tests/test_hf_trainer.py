"""What slipstream/hf_trainer.py relies on in Transformers. A failure here means that upstream moved something."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from slipstream import hf_trainer
from tests.tiny_models import tiny_batch, tiny_model


@pytest.mark.parametrize("hooks", [hf_trainer.CheckpointHooks, hf_trainer.UpdateHook, hf_trainer.LogHook])
def test_hooks_are_methods_of_trainer_with_these_arguments(hooks: type) -> None:
    for name, hook in vars(hooks).items():
        if name.startswith("_") and not name.startswith("__"):
            theirs = inspect.signature(getattr(Trainer, name)).parameters
            assert list(theirs) == list(inspect.signature(hook).parameters), name


def test_when_a_checkpoint_is_loaded() -> None:
    """The hook for RNG is called when the counters are set."""
    assert "self._load_rng_state(resume_from_checkpoint)" in inspect.getsource(Trainer._run_epoch)
    assert "self._load_optimizer_and_scheduler(" in inspect.getsource(Trainer._prepare_for_training)
    loop = inspect.getsource(Trainer._inner_training_loop)
    assert loop.index("self._tr_loss = ") < loop.index("self._run_epoch(")
    assert "self._globalstep_last_logged = " in loop


def test_trainer_calls_us_between_backward_and_update(tmp_path) -> None:
    seen = []

    class Watching(hf_trainer.UpdateHook, Trainer):
        def before_update(self, grad_norm) -> None:
            weight = self.model.lm_head.weight
            grad = weight.grad.norm().item()
            seen.append((float(grad_norm), float(hf_trainer.running_loss(self)), grad, weight.sum().item()))

    model, ids = tiny_model("llama"), tiny_batch(8, 8)
    args = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=4, max_grad_norm=1e-3, report_to="none", use_cpu=True,
        logging_strategy="no", save_strategy="no", disable_tqdm=True, optim="sgd", learning_rate=1.0,
    )  # fmt: skip
    trainer = Watching(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    hf_trainer.set_batch_size(trainer, 2)
    before = model.lm_head.weight.sum().item()
    trainer.train()
    assert len(seen) == 2
    assert seen[0][3] == before  # not updated yet
    assert seen[1][3] != before
    assert all(norm > 2e-3 and clipped <= 1.001e-3 for norm, _, clipped, _ in seen)
    assert 0 < seen[0][1] < seen[1][1]  # summed, as nothing is logged
    assert trainer.state.epoch == 0.5  # of 8 rows, 2 x 2 were taken


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        folder, max_steps=5, per_device_train_batch_size=2, report_to="none", use_cpu=True, save_strategy="no",
        disable_tqdm=True, learning_rate=0.1, logging_steps=2, **options,
    )  # fmt: skip


def rows() -> list[dict[str, Any]]:
    return [{"input_ids": row, "labels": row} for row in tiny_batch(16, 8)]


def test_an_optimizer_that_clips_itself(tmp_path: Path) -> None:
    """`total_norm` takes the place of Trainer's clipping: gradients reach the optimizer whole, weights are the same."""

    class Divides(torch.optim.SGD):
        scale: torch.Tensor | None = None

        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for param in group["params"]:
                    param.grad /= self.scale
            return super().step(closure)

    class Clips(hf_trainer.UpdateHook, Trainer):
        def total_norm(self) -> torch.Tensor:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()])
            self.optimizer.optimizer.scale = ((norm + 1e-6) / 0.01).clamp(min=1)
            return norm

        def before_update(self, grad_norm: torch.Tensor) -> None:
            assert grad_norm > 0.01
            assert self.model.lm_head.weight.grad.norm() > 0.01

    weights, norms = [], []
    for kind, optimizer in ((Trainer, torch.optim.SGD), (Clips, Divides)):
        model, args = tiny_model("llama"), arguments(tmp_path, max_grad_norm=0.01)
        trainer = kind(model, args, train_dataset=rows(), optimizer_cls_and_kwargs=(optimizer, {"lr": 0.1}))
        trainer.train()
        weights.append(model.lm_head.weight.detach())
        norms.append([log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log])
    torch.testing.assert_close(*weights)
    assert norms[0] == pytest.approx(norms[1])


def test_modules_are_put_into_training_mode_once(tmp_path: Path) -> None:
    walks = []

    class Stays(Trainer):
        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            with hf_trainer.staying_in_training(model):
                loss = super().training_step(model, *args, **kwargs)
            assert all(module.training for module in model.modules())
            assert "train" not in model.__dict__
            return loss

    model = tiny_model("llama").eval()
    norm, train = model.model.norm, type(model.model.norm).train
    norm.train = lambda mode=True: walks.append(mode) or train(norm, mode)
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=3, optim="sgd")
    Stays(model, args, train_dataset=rows(), eval_dataset=rows()[:2]).train()
    assert walks == [True, False, True, False]  # around evaluations after steps 3 and 5


class Wrapper(torch.nn.Module):
    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


def adapted(model: Any) -> torch.nn.Module:
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], lora_dropout=0.5))


@pytest.mark.parametrize("wrap", [Wrapper, adapted, lambda model: Wrapper(adapted(model))])
def test_a_wrapper_says_nothing_of_the_model_inside(wrap: Callable[[Any], torch.nn.Module]) -> None:
    wrapper = wrap(tiny_model("llama").eval())
    assert wrapper.training
    for _ in range(2):
        with hf_trainer.staying_in_training(wrapper):
            wrapper.train()
        assert all(module.training for module in wrapper.modules())


def test_logs_can_be_read_later(tmp_path: Path) -> None:
    """What Trainer logs, at the latest before an evaluation and at the end; the mean over the run is the same."""

    class Late(hf_trainer.LogHook, Trainer):
        kept: Any = None

        def record_log(self, steps: int, grad_norm: Any, learning_rate: float, start_time: float | None) -> None:
            self.settle()
            self.kept = (
                self.state.global_step, hf_trainer.running_loss(self).clone(), steps, grad_norm, learning_rate,
            )  # fmt: skip

        def settle(self) -> bool:
            if self.kept is not None:
                (step, loss, steps, norm, rate), self.kept = self.kept, None
                now, self.state.global_step = self.state.global_step, step
                hf_trainer.add_to_whole_loss(self, loss.item())
                self.log({"loss": loss.item() / steps, "grad_norm": norm.item(), "learning_rate": rate})
                self.state.global_step = now
            return False

    class Steps(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            given.append((state.global_step, *(name for name in ("loss", "eval_loss", "train_loss") if name in logs)))

    histories, orders = [], []
    for kind in (Trainer, Late):
        given: list[Any] = []
        args = arguments(tmp_path, eval_strategy="steps", eval_steps=4, optim="sgd")
        trainer = kind(tiny_model("llama"), args, train_dataset=rows(), eval_dataset=rows()[:2], callbacks=[Steps()])
        trainer.train()
        timed = ("runtime", "per_second", "epoch")
        histories.append([
            {key: value for key, value in log.items() if not key.endswith(timed)} for log in trainer.state.log_history
        ])  # fmt: skip
        orders.append(given)
        assert hf_trainer.logged_step(trainer) == 4
    assert histories[0] == histories[1]
    assert orders[0] == orders[1] == [
        (2, "loss"), (4, "loss"), (4, "eval_loss"), (5, "eval_loss"), (5, "train_loss"),
    ]  # fmt: skip
    hf_trainer.set_logged_step(trainer, 3)
    assert hf_trainer.unlogged_loss(trainer)["logged_step"] == 3
