package main

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"image/png"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const fixture = "testdata/results.json" // the bench's own tests compare its form with what bench writes

func loadFixture(t *testing.T) result {
	t.Helper()
	b, err := os.ReadFile(fixture)
	if err != nil {
		t.Fatal(err)
	}
	res, err := parse(b)
	if err != nil {
		t.Fatal(err)
	}
	return res
}

func TestSVGSaysAll(t *testing.T) {
	to := filepath.Join(t.TempDir(), "picture.svg")
	if err := run([]string{"-json", fixture, "-o", to}, io.Discard, io.Discard); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(to)
	if err != nil {
		t.Fatal(err)
	}
	var words []string
	for d := xml.NewDecoder(bytes.NewReader(b)); ; {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("the SVG is not well-formed: %v", err)
		}
		if text, ok := token.(xml.CharData); ok && len(bytes.TrimSpace(text)) > 0 {
			words = append(words, string(bytes.TrimSpace(text)))
		}
	}
	for _, want := range []string{
		"closed-loop clients", "Acknowledged commands per second", "Latency in ms: median (solid) and p99 (dashed)",
		"pump: no Raft, the ceiling", "this library", "etcd raft with etcd's WAL", "1", "64", "1k",
	} {
		if !slices.Contains(words, want) {
			t.Errorf("the picture does not say %q but %q", want, words)
		}
	}
	all := strings.Join(words, "\n")
	for _, want := range []string{"128 bytes", "GOMAXPROCS 8", "medians of 2 rounds"} {
		if !strings.Contains(all, want) {
			t.Errorf("the heading does not say %q:\n%s", want, all)
		}
	}
	// Two charts of three systems: solid lines with their marks, bars and dashes.
	for colour, want := range map[string]int{"#808080": 1, "#0072B2": 1, "#009E73": 1} {
		if n := strings.Count(string(b), "stroke:"+colour+";stroke-width:1.25;stroke-dasharray"); n != want {
			t.Errorf("%d dashed lines in %s, want %d", n, colour, want)
		}
	}
	if strings.Contains(string(b), "font-family:Liberation Sans;") {
		t.Error("there is text without a font to fall back to")
	}
}

func TestPNG(t *testing.T) {
	var b bytes.Buffer
	if err := paint(&b, loadFixture(t), "png"); err != nil {
		t.Fatal(err)
	}
	img, err := png.Decode(&b)
	if err != nil {
		t.Fatal(err)
	}
	if got := img.Bounds().Size().String(); got != "(1500,800)" {
		t.Errorf("the picture has %s pixels", got)
	}
	if r, g, bl, a := img.At(2, 2).RGBA(); min(r, g, bl, a) != 0xffff {
		t.Error("the background is not white")
	}
}

func TestSeries(t *testing.T) {
	res := result{
		Rows: []row{
			{System: "b", Clients: 16, OpsPerSec: 50}, {System: "a", Clients: 16, OpsPerSec: 5},
			{System: "b", Clients: 1, OpsPerSec: 10},
		},
		Samples: []sample{
			{System: "b", Clients: 16, OpsPerSec: 40}, {System: "b", Clients: 16, OpsPerSec: 60},
			{System: "b", Clients: 1, OpsPerSec: 10}, {System: "a", Clients: 1, OpsPerSec: 1},
		},
	}
	var got []string
	for _, s := range res.series() {
		for _, p := range s.points {
			got = append(got, fmt.Sprint(s.system, p.Clients, ":", p.low, "-", p.OpsPerSec, "-", p.high))
		}
	}
	want := []string{"b1:10-10-10", "b16:40-50-60", "a16:5-5-5"}
	if !slices.Equal(got, want) {
		t.Errorf("lines %v, want %v", got, want)
	}
	if got := res.clients(); !slices.Equal(got, []int{1, 16}) {
		t.Errorf("clients %v", got)
	}
}

func TestTicks(t *testing.T) {
	for _, c := range []struct {
		low, high float64
		want      string
	}{
		{0.24, 30, "0.5 1 2 5 10 20"},
		{800, 2_100_000, "1k 10k 100k 1M"},
	} {
		var got []string
		for _, tick := range decades(c.low, c.high) {
			got = append(got, tick.Label)
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("ticks from %v to %v: %v, want %s", c.low, c.high, got, c.want)
		}
	}
}

func TestUnknownSystemsDiffer(t *testing.T) {
	if a, b := lookOf("x", 0), lookOf("y", 1); a.color == b.color || a.name != "x" {
		t.Errorf("two systems look alike: %+v, %+v", a, b)
	}
}

func TestErrorsSayWhatToDo(t *testing.T) {
	dir := t.TempDir()
	file := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	picture := filepath.Join(dir, "picture.svg")
	for _, c := range []struct {
		args []string
		want string
	}{
		{nil, "-json results.json"},
		{[]string{"-json", fixture, "-o", "picture.gif"}, ".svg"},
		{[]string{"-json", filepath.Join(dir, "nothing"), "-o", picture}, "no such file"},
		{[]string{"-json", file("empty", "{}"), "-o", picture}, "no rows"},
		{[]string{"-json", file("text", "hello"), "-o", picture}, "text"},
		{[]string{"-json", file("zero", `{"rows":[{"system":"a","clients":1,"ops_per_sec":2,"p50_ms":0,"p99_ms":1}]}`), "-o", picture}, "missing or 0"},
		{[]string{"-json", file("round", `{"rows":[{"system":"a","clients":1,"ops_per_sec":2,"p50_ms":1,"p99_ms":1}],"samples":[{"system":"a"}]}`), "-o", picture}, "nothing was measured"},
	} {
		err := run(c.args, io.Discard, io.Discard)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: error %v, want one that says %q", c.args, err, c.want)
		}
	}
	if _, err := os.Stat(picture); err == nil {
		t.Error("a picture was written after an error")
	}
}
