"""Compress an instruction dataset to 20 % of its rows and fine-tune a language model on them.

    accelerate launch recipes/alpaca_20pct.py
    accelerate launch recipes/alpaca_20pct.py --method random            # the baseline
    accelerate launch recipes/alpaca_20pct.py --method full              # all rows
    accelerate launch recipes/alpaca_20pct.py --dataset_name my.jsonl --model_name_or_path DIR
    accelerate launch recipes/alpaca_20pct.py --model_name_or_path model.gguf   # dequantized
    accelerate launch --config_file recipes/configs/fsdp2.yaml recipes/alpaca_20pct.py

One file makes every row of a comparison. `--config FILE` reads flags from YAML; flags win.
`--output_dir` then holds selection/ (the run folder of `dq-multimodal compress`), model/ (LoRA
adapter, or the whole model with `--use_peft false`) and metrics.json. The same command goes on
where it was interrupted, from the last checkpoint (`--save_steps`).
"""

from dq_multimodal.training.selecting import SelectionArguments
from dq_multimodal.training.sft_run import run_sft

if __name__ == "__main__":
    run_sft(SelectionArguments, {"model_name_or_path": "huggyllama/llama-7b", "max_length": 512})
