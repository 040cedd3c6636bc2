package main

import (
	"bytes"
	"reflect"
	"testing"

	"example.com/raft"
)

func TestStore(t *testing.T) {
	s := newStore()
	steps := []struct {
		what string
		c    command
		want result
	}{
		{"delete of nothing", command{op: opDelete, key: "x"}, result{status: statusNotFound}},
		{"write if present, absent", command{op: opPut, condition: condition{kind: ifPresent}, key: "x"}, result{status: statusConflict}},
		{"write if version, absent", command{op: opPut, condition: condition{ifVersion, 3}, key: "x"}, result{status: statusConflict}},
		{"write if missing", command{op: opPut, condition: condition{kind: ifMissing}, key: "x", value: []byte("1")}, result{status: statusCreated, version: 13}},
		{"write if missing, present", command{op: opPut, condition: condition{kind: ifMissing}, key: "x", value: []byte("2")}, result{status: statusConflict, version: 13}},
		{"write", command{op: opPut, key: "x", value: []byte("3")}, result{status: statusOK, version: 15}},
		{"write if version, old", command{op: opPut, condition: condition{ifVersion, 14}, key: "x", value: []byte("4")}, result{status: statusConflict, version: 15}},
		{"write if version", command{op: opPut, condition: condition{ifVersion, 15}, key: "x", value: []byte("5")}, result{status: statusOK, version: 17}},
		{"write if present", command{op: opPut, condition: condition{kind: ifPresent}, key: "x", value: nil}, result{status: statusOK, version: 18}},
		{"delete if version, old", command{op: opDelete, condition: condition{ifVersion, 17}, key: "x"}, result{status: statusConflict, version: 18}},
		{"delete if version", command{op: opDelete, condition: condition{ifVersion, 18}, key: "x"}, result{status: statusOK, version: 18}},
		{"add to nothing", command{op: opAdd, key: "n", value: []byte("-2")}, result{status: statusCreated, version: 21, value: []byte("-2")}},
		{"add", command{op: opAdd, key: "n", value: []byte("9223372036854775807")}, result{status: statusOK, version: 22, value: []byte("9223372036854775805")}},
		{"add too much", command{op: opAdd, key: "n", value: []byte("3")}, result{status: statusNoNumber, version: 22, value: []byte("the sum has more than 64 bits")}},
		{"add if version", command{op: opAdd, condition: condition{ifVersion, 22}, key: "n", value: []byte("2")}, result{status: statusOK, version: 24, value: []byte("9223372036854775807")}},
		{"add if version, old", command{op: opAdd, condition: condition{ifVersion, 22}, key: "n", value: []byte("-1")}, result{status: statusConflict, version: 24}},
		{"add no number", command{op: opAdd, key: "n", value: []byte("1.5")}, result{status: statusNoNumber, version: 24, value: []byte("what is to be added is not a decimal number of at most 64 bits")}},
		{"write a word", command{op: opPut, key: "w", value: []byte("word")}, result{status: statusCreated, version: 27}},
		{"add to a word", command{op: opAdd, key: "w", value: []byte("1")}, result{status: statusNoNumber, version: 27, value: []byte("its value is not a decimal number of at most 64 bits")}},
		{"add the lowest", command{op: opAdd, key: "m", value: []byte("-9223372036854775808")}, result{status: statusCreated, version: 29, value: []byte("-9223372036854775808")}},
		{"add below the lowest", command{op: opAdd, key: "m", value: []byte("-1")}, result{status: statusNoNumber, version: 29, value: []byte("the sum has more than 64 bits")}},
		{"add nothing", command{op: opAdd, key: "m", value: []byte("0")}, result{status: statusOK, version: 31, value: []byte("-9223372036854775808")}},
	}
	for i, step := range steps {
		answer := s.Apply(raft.Entry{Index: raft.Index(10 + i), Data: step.c.encode()})
		got, err := decodeResult(answer)
		if err != nil {
			t.Fatalf("%s: %v", step.what, err)
		}
		if got.status != step.want.status || got.version != step.want.version || !bytes.Equal(got.value, step.want.value) {
			t.Errorf("%s: %+v, want %+v", step.what, got, step.want)
		}
	}
}

// A value must not be a part of the entry that brought it: the library may keep
// a whole megabyte alive for it.
func TestStoreCopiesValues(t *testing.T) {
	s := newStore()
	data := command{op: opPut, key: "x", value: []byte("before")}.encode()
	s.Apply(raft.Entry{Index: 1, Data: data})
	clear(data)
	if got := s.get("x"); string(got.value) != "before" || got.version != 1 {
		t.Errorf("the key is %+v after the entry was overwritten", got)
	}
}

func TestStoreRefusesMalformedCommands(t *testing.T) {
	valid := command{op: opDelete, condition: condition{ifVersion, 300}, key: "key"}.encode()
	bad := map[string][]byte{
		"operation 0":       {0, 0, 1, 'k'},
		"operation 4":       {4, 0, 1, 'k'},
		"condition 4":       {1, 4, 1, 'k'},
		"version 0":         {1, byte(ifVersion), 0, 1, 'k'},
		"no key":            {1, 0, 0},
		"huge key length":   {1, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 'k'},
		"overlong uvarint":  {1, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1},
		"value of a delete": append(command{op: opDelete, key: "k"}.encode(), 'v'),
	}
	for n := range len(valid) {
		bad["cut after "+string(rune('0'+n))] = valid[:n]
	}
	s := newStore()
	for what, data := range bad {
		got, err := decodeResult(s.Apply(raft.Entry{Index: 1, Data: data}))
		if err != nil || got.status != statusMalformed || len(got.value) == 0 {
			t.Errorf("%s: %+v, %v; want a refusal with its reason", what, got, err)
		}
	}
	if len(s.items) > 0 {
		t.Errorf("malformed commands left %d keys", len(s.items))
	}
}

func FuzzDecodeCommand(f *testing.F) {
	f.Add(command{op: opPut, condition: condition{ifVersion, 7}, key: "k", value: []byte("v")}.encode())
	f.Add([]byte{1, 0, 1, 'k'})
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := decodeCommand(b)
		if err != nil {
			return
		}
		again, err := decodeCommand(c.encode())
		if err != nil || !reflect.DeepEqual(c, again) {
			t.Errorf("%+v became %+v, %v", c, again, err)
		}
	})
}

func TestStoreNewest(t *testing.T) {
	s := newStore()
	for i, key := range []string{"a", "b", "c", "a"} {
		value := bytes.Repeat([]byte{'v', 0xff}, 200*i)
		s.Apply(raft.Entry{Index: raft.Index(i + 1), Data: command{op: opPut, key: key, value: value}.encode()})
	}
	keys, total := s.newest(2)
	if total != 3 || len(keys) != 2 || keys[0].Key != "a" || keys[0].Version != 4 || keys[1].Key != "c" {
		t.Errorf("newest: %+v of %d", keys, total)
	}
	if n := len(keys[0].Value); n > maxShownBytes+len("…") {
		t.Errorf("a value is shown with %d bytes", n)
	}
}
