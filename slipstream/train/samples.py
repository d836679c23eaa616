"""What the model says: its answers to a few prompts at each evaluation, so that a curve has words beside it."""

from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Samples(TrainerCallback):
    """Answers the recipe's prompts, greedily, at each evaluation; prints the answers and hands them to `record`.

    All ranks have to generate together where the model is sharded, so make it on all of them.

    Attributes:
        record: called with the step and a list of `{"prompt": …, "answer": …}`; None on ranks that write nothing.
        answers: the latest, in the order of the prompts.
        step: the optimizer step they are of, None before the first.
    """

    def __init__(
        self, prompts: list[str], max_new_tokens: int, tokenizer: PreTrainedTokenizerBase, console: Console
    ) -> None:
        self.prompts, self.max_new_tokens = prompts, max_new_tokens
        self.record: Callable[[int, list[dict[str, str]]], None] | None = None
        self.answers: list[str] = []
        self.step: int | None = None
        self._tokenizer, self._console = tokenizer, console

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.answer(kwargs["model"], state.global_step)

    def answer(self, model: Any, step: int) -> list[str]:
        """The answers at this step; they are made once."""
        if self.step != step:
            self.step = step
            self.answers = [answer(model, self._tokenizer, prompt, self.max_new_tokens) for prompt in self.prompts]
            pairs = [{"prompt": p, "answer": a} for p, a in zip(self.prompts, self.answers, strict=True)]
            for pair in pairs:
                for key in ("prompt", "answer"):
                    self._console.print(Text.assemble((f"{key}: ", "bold"), pair[key]))
            if pairs and self.record is not None:
                self.record(step, pairs)
        return self.answers


def answer(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int) -> str:
    """The model's greedy answer, as a chat turn when the tokenizer has a chat template, else as a continuation."""
    if tokenizer.chat_template is not None:
        turn = [{"role": "user", "content": prompt}]
        inputs: Any = tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    was_training = model.training
    model.eval()
    with torch.no_grad():
        output = model.generate(
            input_ids=inputs["input_ids"].to(model.device),
            attention_mask=inputs["attention_mask"].to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
    model.train(was_training)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
