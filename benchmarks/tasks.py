"""lm-eval tasks of multiple-choice files: each as it is, and those with short answers also as text to be generated.

    python benchmarks/tasks.py FILE.jsonl[.xz] [...] --generate NAME,NAME --out DIR

A line of a file holds `context`, `choices`, `gold` and `norm` (`sum`, or per byte: then the length of a choice does not
count). `DIR` is for `--include-path`. A task `NAME_generated` asks for the right choice word for word: a model that one
damaged neuron makes ramble fails there, while its preference among given choices may be intact.
"""

from __future__ import annotations

import argparse
import json
import lzma
from pathlib import Path

_COMMON = {
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_text": "{{context}}",
    "target_delimiter": "",
    "metadata": {"version": 1.0},
}


def write_task(file: Path, generate: bool, out: Path) -> None:
    """Write the rows of a file and the task files that read them."""
    name = file.name.split(".")[0]
    text = lzma.decompress(file.read_bytes()).decode() if file.suffix == ".xz" else file.read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    data = out / f"{name}.jsonl"
    data.write_text("".join(json.dumps({k: row[k] for k in ("context", "choices", "gold")}) + "\n" for row in rows))
    common = _COMMON | {"dataset_kwargs": {"data_files": {"test": str(data.absolute())}}}
    metric = "acc" if rows[0]["norm"] == "sum" else "acc_norm"
    chosen = common | {
        "task": name, "output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (out / f"{name}.yaml").write_text(json.dumps(chosen, indent=2))  # JSON is YAML
    if generate:
        asked = common | {
            "task": f"{name}_generated", "output_type": "generate_until",
            "doc_to_target": "{{choices[gold] | replace('>>', '')}}",
            "generation_kwargs": {"until": ["\n", ">>"], "do_sample": False, "max_gen_toks": 24},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        }  # fmt: skip
        (out / f"{name}_generated.yaml").write_text(json.dumps(asked, indent=2))


def main() -> None:
    """Write all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--generate", type=lambda text: set(filter(None, text.split(","))), default=set())
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for file in arguments.files:
        write_task(file, file.name.split(".")[0] in arguments.generate, arguments.out)


if __name__ == "__main__":
    main()
