"""Does the student cost v1.3 anything?

    python -m launch.train --config=configs/ablations/v1_3_no_student.py \\
        --run_name=v1_3_no_student --config.dataset.h5py_dir=/path/to/h5data/num
"""

from ml_collections import ConfigDict

from . import common

CHANGES = {
    "model.location_token_distillation_head_config": None,
    "model.encoder_config.attention_pooler_config.student_dims": None,
    "model.encoder_config.attention_pooler_config.student_output_norm": False,
}


def get_config(arg: str = "") -> ConfigDict:
    """The base config with CHANGES; `arg` is the text after the colon."""
    return common.ablation(arg, "v1_3_no_student", CHANGES, version="v1_3")
