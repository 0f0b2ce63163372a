"""Who learns: backbones, teachers and heads."""
