"""Scoring and timing of one artifact, in child processes of their own."""

from edgeft.bench.accuracy import accuracy
from edgeft.bench.general import general
from edgeft.bench.job import Job, job_of_bundle
from edgeft.bench.latency import latency
from edgeft.bench.machine import machine_facts

__all__ = ["Job", "accuracy", "general", "job_of_bundle", "latency", "machine_facts"]
