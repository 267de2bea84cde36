"""Training: optimiser, schedule, state, step and loop."""

from olmoearth_jax.exports import exported

__getattr__, __dir__ = exported(
    __name__,
    {
        "build": "Training build_training",
        "loop": "Extras",
        "metrics": "MetricWriter Sink read_metrics",
        "runfolder": "RunFolder",
        "step": "TrainProgram",
    },
)
