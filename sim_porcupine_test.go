package raft

import (
	"math"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
)

// simInput is a client's command for porcupine, simOutput what it was told.
type simInput struct {
	key   byte
	write bool
	id    uint64
}

type simOutput struct {
	known    bool
	previous uint64
}

// registers is the sequential specification: each command returns what its key
// held before it.
var registers = porcupine.Model{
	Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
		parts := make([][]porcupine.Operation, simKeys)
		for _, o := range history {
			k := o.Input.(simInput).key
			parts[k] = append(parts[k], o)
		}
		return parts
	},
	Init: func() any { return uint64(0) },
	Step: func(state, input, output any) (bool, any) {
		held, in, out := state.(uint64), input.(simInput), output.(simOutput)
		if out.known && out.previous != held {
			return false, state
		}
		if in.write {
			return true, in.id
		}
		return true, held
	},
}

// history returns what the clients saw, and how many of them do not know what
// became of their command: those may take effect at any time, or never.
func (l *simClients) history() (ops []porcupine.Operation, unknown int) {
	for _, op := range l.ops {
		o := porcupine.Operation{ClientId: len(ops), Input: simInput{op.key, op.write, op.id}, Call: int64(op.invoked)}
		switch op.state {
		case opRejected:
			continue
		case opAnswered:
			o.Return, o.Output = int64(op.returned), simOutput{true, op.value}
		default:
			unknown++
			o.Return, o.Output = math.MaxInt64, simOutput{}
		}
		ops = append(ops, o)
	}
	return ops, unknown
}

// judge lets porcupine, which knows nothing of logs, decide about histories
// that are small enough for it.
func (l *simClients) judge(s *sim) {
	ops, unknown := l.history()
	if len(ops) == 0 || len(ops) > 800 || unknown > 6*s.swarm.keys {
		return
	}
	switch porcupine.CheckOperationsTimeout(registers, ops, 5*time.Second) {
	case porcupine.Ok:
		s.judged++
	case porcupine.Illegal:
		s.fail("21 porcupine: the history of %d operations is not linearizable", len(ops))
	}
}

// The judge must be able to say no.
func TestPorcupineRefuses(t *testing.T) {
	op := func(call, ret int64, write bool, id, previous uint64) porcupine.Operation {
		return porcupine.Operation{Input: simInput{0, write, id}, Call: call, Return: ret, Output: simOutput{true, previous}}
	}
	good := []porcupine.Operation{op(0, 1, true, 1, 0), op(2, 3, false, 2, 1)}
	stale := []porcupine.Operation{op(0, 1, true, 1, 0), op(2, 3, false, 2, 0)}
	if !porcupine.CheckOperations(registers, good) || porcupine.CheckOperations(registers, stale) {
		t.Error("porcupine does not tell a stale read from a fresh one")
	}
}
