"""Tests of hf_equissl.evaluation."""
