"""The parameters: every value that a stage reads, as frozen sections of params.yaml.

No field has a default: a value that is not in the file is an error, so that DVC sees every
change. Each section goes to the one function that its stage calls.
"""
