"""The measures of `megatron-ext evaluate`, each with its flags, rows and pictures: `measure.MeasureKind`."""
