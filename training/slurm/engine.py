"""Print, as shell exports, what `accelerate launch --config_file FILE` would tell its processes about the engine.

Slurm starts one task per GPU itself (``pretrain.sbatch``), so nothing else of the launcher is needed.
"""

from __future__ import annotations

import shlex
import sys

from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

ENGINE_VARIABLES = ("ACCELERATE_", "FSDP_")


def engine_variables(config_file: str) -> dict[str, str]:
    """List the variables by name, without ranks, machines and ports, which Slurm knows."""
    words = ["--config_file", config_file, "--num_machines", "1", "--num_processes", "2", "--main_process_port", "0"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args([*words, "pretrain.py"]))
    if args.use_deepspeed:
        fields = load_config_from_file(config_file).deepspeed_config
        args.deepspeed_fields_from_accelerate_config = ",".join(fields)
        _, variables = prepare_deepspeed_cmd_env(args)
    else:
        variables = prepare_multi_gpu_env(args)
    return {name: value for name, value in variables.items() if name.startswith(ENGINE_VARIABLES)}


if __name__ == "__main__":
    for name, value in engine_variables(sys.argv[1]).items():
        print(f"export {name}={shlex.quote(value)}")
