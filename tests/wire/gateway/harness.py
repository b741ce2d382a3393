"""lm-evaluation-harness as people run it: its command line, tasks in files, results from files."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIKELIHOOD, ANSWERS, ROLLING = "pema_likelihood", "pema_answers", "pema_rolling"
LONGEST_ANSWER = 12
"""Tokens of the longest generated answer."""
# The harness takes the name of a column as the column.
_TASKS = {
    LIKELIHOOD: """
output_type: loglikelihood
doc_to_text: prompt
doc_to_target: target
metric_list: [{metric: acc}]
""",
    ANSWERS: f"""
output_type: generate_until
doc_to_text: prompt
doc_to_target: target
generation_kwargs: {{until: ["\\n"], max_gen_toks: {LONGEST_ANSWER}, do_sample: false}}
metric_list: [{{metric: exact_match}}]
""",
    ROLLING: """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: word_perplexity}]
""",
}


@dataclass(frozen=True)
class Harness:
    """The harness in an environment of its own, with a folder of tasks.

    Attributes:
        python: interpreter of its environment.
        environment: its variables, which keep it from the network.
        folder: folder of the tasks and the results.
    """

    python: Path
    environment: Mapping[str, str]
    folder: Path

    def write_tasks(self, texts: Sequence[Mapping[str, str]]) -> None:
        """Write the tasks and their texts, each with `prompt`, `target` and `text`."""
        data = self.folder / "texts.jsonl"
        data.write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
        for name, fields in _TASKS.items():
            source = f'dataset_path: json\ndataset_kwargs: {{data_files: {{test: "{data}"}}}}\ntest_split: test'
            task = f'task: {name}\n{source}\ntarget_delimiter: ""{fields}'
            (self.folder / f"{name}.yaml").write_text(task, encoding="utf-8")

    def run(self, kind: str, tasks: Sequence[str], *flags: str, **model_arguments: Any) -> dict[str, list[Any]]:
        """Run tasks, and return what the model answered to each text, by task.

        Args:
            kind: kind of the model, such as `local-completions`.
            tasks: names of the tasks.
            flags: further flags of the command.
            model_arguments: arguments of the model.
        """
        results = self.folder / "results"
        arguments = ",".join(f"{name}={value}" for name, value in model_arguments.items())
        command = [str(self.python), "-m", "lm_eval", "run", "--model", kind, "--model_args", arguments, *flags]
        command += ["--tasks", ",".join(tasks), "--include_path", str(self.folder)]
        command += ["--output_path", str(results), "--log_samples"]
        done = subprocess.run(command, capture_output=True, text=True, env=dict(self.environment), check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return {name: _answers(results, name) for name in tasks}


def _answers(results: Path, task: str) -> list[Any]:
    """The answers in the order of the texts."""
    (file,) = results.rglob(f"samples_{task}_*.jsonl")
    samples = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [sample["resps"][0][0] for sample in sorted(samples, key=lambda sample: int(sample["doc_id"]))]
