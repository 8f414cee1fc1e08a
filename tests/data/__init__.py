"""Tests of hf_equissl.data."""
