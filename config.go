package raft
