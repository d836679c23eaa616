"""Job files for clusters: torchrun on N nodes, restarted where a rank dies and continued where the job is stopped."""
