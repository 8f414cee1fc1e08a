"""The command ``hf-equissl``: the scripts of ``training/`` by one name, without a checkout."""
