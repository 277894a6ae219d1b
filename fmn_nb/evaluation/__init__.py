"""What was forgotten and what was kept: protocol, judges, measures, reports."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={
    "clip": ["Clip", "ClipJudge"],
    "evaluator": ["evaluate"],
    "measures": ["Measures", "UnjudgeableError", "harmonic_mean", "judge_images", "measure", "with_ceiling"],
    "oracle": ["OracleReport", "apart"],
    "protocol": ["Drawing", "Share", "draw", "drawings", "evenly", "probe_shares", "share_of"],
    "quality": ["Features", "judge_features"],
    "report": ["Report"],
    "sequence": ["rebound", "sequence_table", "stages", "together_table"],
    "session": ["MeasurementError", "Sampling", "Session", "draw_images", "images_at_once"],
})
