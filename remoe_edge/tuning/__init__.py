"""Fine-tuning of MoE routers so that neighbouring tokens reuse experts (ReMoE, arXiv 2605.27081). Needs torch."""
