package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"sync"

	"example.com/raft"
)

// Store is the replicated state machine: keys with values and versions. Every
// node applies the same commands in the same order, so every node holds the
// same keys. A version is the index of the log entry that wrote it: 0 means
// that there is no such key.
type Store struct {
	mu      sync.Mutex // Apply runs on the node's goroutine, the status page reads beside it
	items   map[string]item
	applied raft.Index // the newest command
	history history    // for watches; of this node, no part of the state
}

type item struct {
	value   []byte
	version raft.Index
}

func newStore() *Store {
	return &Store{items: map[string]item{}, history: history{maxChanges: maxHistory, maxBytes: maxHistoryBytes}}
}

// Apply executes one committed command. Nothing but the command and the state
// decides its result: no clock, no randomness, no map order. What it refuses it
// refuses on every node, as a result like any other.
func (s *Store) Apply(e raft.Entry) []byte {
	c, err := decodeCommand(e.Data)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.applied = e.Index
	if err != nil {
		return result{status: statusMalformed, value: []byte(err.Error())}.encode()
	}
	old := s.items[c.key]
	if !c.condition.holds(old.version) {
		return result{status: statusConflict, version: old.version}.encode()
	}
	switch c.op {
	case opPut:
		// The value is copied, because e.Data is part of a larger buffer that
		// a kept slice would keep in memory.
		return s.write(c.key, bytes.Clone(c.value), e.Index, nil)
	case opAdd:
		sum, err := add(old, c.value)
		if err != nil {
			return result{status: statusNoNumber, version: old.version, value: []byte(err.Error())}.encode()
		}
		return s.write(c.key, sum, e.Index, sum)
	}
	if old.version == 0 {
		return result{status: statusNotFound}.encode()
	}
	delete(s.items, c.key)
	s.history.add(change{Index: e.Index, Key: c.key, Deleted: true})
	return result{status: statusOK, version: old.version}.encode()
}

// write stores a value and returns the result, which holds answer.
func (s *Store) write(key string, value []byte, at raft.Index, answer []byte) []byte {
	r := result{status: statusOK, version: at, value: answer}
	if s.items[key].version == 0 {
		r.status = statusCreated
	}
	s.items[key] = item{value, at}
	s.history.add(change{Index: at, Key: key, Value: value})
	return r.encode()
}

// add returns the sum of a key's value, 0 if there is no such key, and n. Both
// are decimal.
func add(old item, n []byte) ([]byte, error) {
	a, b := int64(0), int64(0)
	var err error
	if old.version != 0 {
		if a, err = strconv.ParseInt(string(old.value), 10, 64); err != nil {
			return nil, errors.New("its value is not a decimal number of at most 64 bits")
		}
	}
	if b, err = strconv.ParseInt(string(n), 10, 64); err != nil {
		return nil, errors.New("what is to be added is not a decimal number of at most 64 bits")
	}
	if sum := a + b; (sum > a) == (b > 0) {
		return strconv.AppendInt(nil, sum, 10), nil
	}
	return nil, errors.New("the sum has more than 64 bits")
}

// get returns what this node holds of a key now; its version is 0 if that is
// nothing.
func (s *Store) get(key string) item {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.items[key]
}

// storedItem is an item in a snapshot. The first one has no key: its version is
// the newest command that the snapshot includes, from which on a watch can go on.
type storedItem struct {
	Key     string
	Value   []byte
	Version raft.Index
}

// Snapshot captures the keys as they are now. Values never change in place, so
// copying the map is all that Apply has to wait for.
func (s *Store) Snapshot() (raft.Capture, error) {
	s.mu.Lock()
	items, applied := maps.Clone(s.items), s.applied
	s.mu.Unlock()
	return raft.CaptureFunc(func(ctx context.Context, w io.Writer) error {
		out := bufio.NewWriter(w)
		enc := gob.NewEncoder(out)
		if err := enc.Encode(storedItem{Version: applied}); err != nil {
			return err
		}
		for key, it := range items {
			if err := cmp.Or(ctx.Err(), enc.Encode(storedItem{key, it.value, it.version})); err != nil {
				return err
			}
		}
		return out.Flush()
	}), nil
}

// Restore replaces all keys by those of a snapshot.
func (s *Store) Restore(r io.Reader) error {
	items, applied := map[string]item{}, raft.Index(0)
	for dec := gob.NewDecoder(r); ; {
		var it storedItem
		err := dec.Decode(&it)
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		applied = max(applied, it.Version)
		if it.Key != "" {
			items[it.Key] = item{it.Value, it.Version}
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.items, s.applied = items, applied
	s.history.restart(applied)
	return nil
}

// keyInfo is a key as the status page shows it.
type keyInfo struct {
	Key     string     `json:"key"`
	Value   string     `json:"value"`
	Version raft.Index `json:"version"`
}

const maxShownBytes = 200 // of a value on the status page

// newest returns the n keys written last, newest first, and how many there
// are. It shows what this node has applied so far, which may be behind: clients
// read by api.get instead.
func (s *Store) newest(n int) (keys []keyInfo, total int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	keys = []keyInfo{}
	for key, it := range s.items {
		keys = append(keys, keyInfo{Key: key, Version: it.version})
	}
	slices.SortFunc(keys, func(a, b keyInfo) int { return cmp.Compare(b.Version, a.Version) })
	total = len(keys)
	keys = keys[:min(n, total)]
	for i, k := range keys {
		keys[i].Value = shorten(s.items[k.Key].value)
	}
	return keys, total
}

func shorten(value []byte) string {
	if len(value) > maxShownBytes {
		return string(bytes.ToValidUTF8(value[:maxShownBytes], nil)) + "…"
	}
	return string(bytes.ToValidUTF8(value, []byte("\uFFFD")))
}

// A command is one operation on one key, under a condition on its version.
//
//	byte     op
//	byte     kind of condition
//	uvarint  version          only if the condition is ifVersion
//	uvarint  length of the key
//	bytes    key
//	bytes    value            the rest; only if op is opPut or opAdd
type command struct {
	op        op
	condition condition
	key       string
	value     []byte
}

type op byte

const (
	opPut op = iota + 1
	opDelete
	opAdd // to a decimal number
)

type condition struct {
	kind    conditionKind
	version raft.Index // of ifVersion
}

type conditionKind byte

const (
	always conditionKind = iota
	ifMissing
	ifPresent
	ifVersion
)

// holds tells whether the condition is true of a key at version.
func (c condition) holds(version raft.Index) bool {
	switch c.kind {
	case ifMissing:
		return version == 0
	case ifPresent:
		return version != 0
	case ifVersion:
		return version == c.version
	}
	return true
}

const (
	maxKeyBytes     = 1 << 10
	maxValueBytes   = 1 << 20
	maxCommandBytes = 2 + 2*binary.MaxVarintLen64 + maxKeyBytes + maxValueBytes
)

func (c command) encode() []byte {
	b := make([]byte, 0, 2+2*binary.MaxVarintLen64+len(c.key)+len(c.value))
	b = append(b, byte(c.op), byte(c.condition.kind))
	if c.condition.kind == ifVersion {
		b = binary.AppendUvarint(b, uint64(c.condition.version))
	}
	b = binary.AppendUvarint(b, uint64(len(c.key)))
	b = append(b, c.key...)
	return append(b, c.value...)
}

// decodeCommand trusts nothing: a command may come from another release of this
// program. The value is a part of b, not a copy.
func decodeCommand(b []byte) (command, error) {
	if len(b) < 2 {
		return command{}, errors.New("kv: the command is shorter than its header")
	}
	c := command{op: op(b[0]), condition: condition{kind: conditionKind(b[1])}}
	if c.op < opPut || c.op > opAdd {
		return command{}, fmt.Errorf("kv: operation %d is unknown", c.op)
	}
	if c.condition.kind > ifVersion {
		return command{}, fmt.Errorf("kv: condition %d is unknown", c.condition.kind)
	}
	b = b[2:]
	if c.condition.kind == ifVersion {
		version, n := binary.Uvarint(b)
		if n <= 0 || version == 0 {
			return command{}, errors.New("kv: the condition has no valid version")
		}
		c.condition.version, b = raft.Index(version), b[n:]
	}
	size, n := binary.Uvarint(b)
	if n <= 0 || size == 0 || size > maxKeyBytes || size > uint64(len(b)-n) {
		return command{}, errors.New("kv: the length of the key is wrong")
	}
	b = b[n:]
	c.key, c.value = string(b[:size]), b[size:]
	if len(c.value) > 0 && c.op == opDelete {
		return command{}, fmt.Errorf("kv: %d bytes follow the key of a command without a value", len(c.value))
	}
	return c, nil
}

// A result is what Apply answers: a status byte, the key's version as a
// uvarint, and the sum of an opAdd or what is wrong with the command.
type result struct {
	status  status
	version raft.Index // after the command; of the key that was deleted; or that made it conflict
	value   []byte
}

type status byte

const (
	statusOK        status = iota + 1
	statusCreated          // there was no such key
	statusNotFound         // there is no such key
	statusConflict         // the condition does not hold, nothing was changed
	statusMalformed        // value says why
	statusNoNumber         // nothing can be added to the key: value says why, nothing was changed
)

func (r result) encode() []byte {
	b := make([]byte, 0, 1+binary.MaxVarintLen64+len(r.value))
	b = binary.AppendUvarint(append(b, byte(r.status)), uint64(r.version))
	return append(b, r.value...)
}

func decodeResult(b []byte) (result, error) {
	if len(b) == 0 {
		return result{}, errors.New("kv: the result is empty")
	}
	version, n := binary.Uvarint(b[1:])
	if n <= 0 {
		return result{}, errors.New("kv: the result has no valid version")
	}
	return result{status(b[0]), raft.Index(version), b[1+n:]}, nil
}
