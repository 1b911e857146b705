"""An API server on etcd, a private libvirtd and a guest that keeps writing, for the demo, tests and benchmarks.

Every part is real, keeps its files in the directory that it is given, and listens on loopback only. Modules that run
before anything is installed use the standard library only.
"""
