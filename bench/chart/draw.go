package main

import (
	"bytes"
	"fmt"
	"image/color"
	"io"
	"math"
	"strconv"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgimg"
	"gonum.org/v1/plot/vg/vgsvg"
)

// The picture: a title above, a legend below, and between them two charts side
// by side. Nothing is written over the lines.
const (
	width    = vg.Length(750) // points, of which a browser shows 0.75 for a pixel
	height   = vg.Length(400)
	margin   = vg.Length(12)
	heading  = vg.Length(50)
	between  = vg.Length(20)
	legendIn = 3 // columns
	legendUp = vg.Length(17)
	imageDPI = 144
)

// look is how a system's lines are drawn.
type look struct {
	name  string
	color color.RGBA
	width vg.Length
	glyph draw.GlyphDrawer
}

func rgb(c uint32) color.RGBA { return color.RGBA{uint8(c >> 16), uint8(c >> 8), uint8(c), 255} }

// lookOf gives known systems their usual colours, which differ for the
// colour-blind too (Okabe and Ito), and others what is left.
func lookOf(system string, nth int) look {
	switch system {
	case "pump":
		return look{"pump: no Raft, the ceiling", rgb(0x808080), 1.25, draw.RingGlyph{}}
	case "raft":
		return look{"this library", rgb(0x0072b2), 2.5, draw.CircleGlyph{}}
	case "hashicorp":
		return look{"hashicorp/raft with raft-wal", rgb(0xd55e00), 1.5, draw.BoxGlyph{}}
	case "etcd":
		return look{"etcd raft with etcd's WAL", rgb(0x009e73), 1.5, draw.PyramidGlyph{}}
	case "etcd-packed":
		return look{"etcd raft, commands packed", rgb(0xcc79a7), 1.5, draw.TriangleGlyph{}}
	}
	spare := []uint32{0xe69f00, 0x56b4e9, 0x000000, 0xb8a800}
	return look{system, rgb(spare[nth%len(spare)]), 1.5, draw.PlusGlyph{}}
}

func (l look) line(dashed bool) draw.LineStyle {
	if dashed {
		return draw.LineStyle{Color: l.color, Width: 1.25, Dashes: []vg.Length{4, 3}}
	}
	return draw.LineStyle{Color: l.color, Width: l.width}
}

func (l look) mark() draw.GlyphStyle {
	return draw.GlyphStyle{Color: l.color, Radius: 3.2, Shape: l.glyph}
}

// paint writes the whole picture.
func paint(w io.Writer, res result, format string) error {
	throughput, err := throughputChart(res)
	if err != nil {
		return err
	}
	latency, err := latencyChart(res)
	if err != nil {
		return err
	}
	var canvas vg.CanvasWriterTo
	if format == "png" {
		canvas = vgimg.PngCanvas{Canvas: vgimg.NewWith(vgimg.UseWH(width, height), vgimg.UseDPI(imageDPI))}
	} else {
		canvas = vgsvg.New(width, height)
	}
	all := draw.New(canvas)
	all.SetColor(color.White)
	all.Fill(all.Rectangle.Path())
	lines := (len(res.series()) + legendIn - 1) / legendIn
	footing := margin + legendUp*vg.Length(lines) + 6
	drawHeading(draw.Crop(all, margin, -margin, 0, -margin), res)
	drawLegend(draw.Crop(all, margin, -margin, margin, 0), res)
	middle := draw.Crop(all, margin, -margin, footing, -heading)
	half := (middle.Size().X - between) / 2
	throughput.Draw(draw.Crop(middle, 0, -half-between, 0, 0))
	latency.Draw(draw.Crop(middle, half+between, 0, 0, 0))

	var b bytes.Buffer
	if _, err := canvas.WriteTo(&b); err != nil {
		return err
	}
	picture := b.Bytes()
	if format == "svg" {
		// Liberation's fonts have the widths of Arial's, so the text still fits.
		picture = bytes.ReplaceAll(picture, []byte("font-family:Liberation Sans;"),
			[]byte("font-family:Liberation Sans,Arimo,Arial,Helvetica,sans-serif;"))
	}
	_, err = w.Write(picture)
	return err
}

// write returns a style for text, in a grey or black that reads well on white.
func write(size vg.Length, shade uint32) text.Style {
	return text.Style{
		Color:   rgb(shade),
		Font:    font.From(font.Font{Typeface: "Liberation", Variant: "Sans"}, size),
		Handler: plot.DefaultTextHandler,
	}
}

func drawHeading(c draw.Canvas, res result) {
	title := write(14, 0x000000)
	title.YAlign = text.YTop
	c.FillText(title, vg.Point{X: c.Min.X, Y: c.Max.Y}, fmt.Sprintf(
		"Replicating commands of %d bytes, each fsynced on two of three nodes before it is acknowledged", res.Size))
	m, rounds := res.Machine, res.rounds()
	if rounds != oneRound {
		rounds += ", bars from the lowest round to the highest"
	}
	below := write(10, 0x555555)
	below.YAlign = text.YTop
	c.FillText(below, vg.Point{X: c.Min.X, Y: c.Max.Y - 19}, fmt.Sprintf(
		"One process, TCP on loopback, %s, %d CPUs, GOMAXPROCS %d, %s; %s",
		m.FileSystem, m.CPUs, m.GOMAXPROCS, m.Go, rounds))
}

// drawLegend writes the systems in rows from the left to the right.
func drawLegend(c draw.Canvas, res result) {
	all := res.series()
	lines := (len(all) + legendIn - 1) / legendIn
	label := write(11, 0x000000)
	label.YAlign = text.YCenter
	for i, s := range all {
		l := lookOf(s.system, i)
		x := c.Min.X + c.Size().X/legendIn*vg.Length(i%legendIn)
		y := c.Min.Y + legendUp*(vg.Length(lines-1-i/legendIn)+0.5)
		c.StrokeLine2(l.line(false), x, y, x+28, y)
		c.DrawGlyph(l.mark(), vg.Point{X: x + 14, Y: y})
		c.FillText(label, vg.Point{X: x + 35, Y: y}, l.name)
	}
}

// newChart is an empty chart over the number of clients, both axes logarithmic.
// The values run from low to high.
func newChart(res result, title string, low, high float64) *plot.Plot {
	p := plot.New()
	p.Title.Text = title
	p.Title.TextStyle = write(12, 0x000000)
	p.Title.TextStyle.XAlign = text.XCenter
	p.Title.TextStyle.YAlign = text.YTop
	p.Title.Padding = 6
	for _, a := range []*plot.Axis{&p.X, &p.Y} {
		a.Scale = plot.LogScale{}
		a.Padding = 0
		a.LineStyle.Color = rgb(0x555555)
		a.Tick.LineStyle.Color = rgb(0x555555)
		tick := write(10, 0x333333)
		tick.XAlign, tick.YAlign = a.Tick.Label.XAlign, a.Tick.Label.YAlign
		a.Tick.Label = tick
		name := write(11, 0x000000)
		name.XAlign, name.YAlign = a.Label.TextStyle.XAlign, a.Label.TextStyle.YAlign
		a.Label.TextStyle = name
	}
	p.X.Label.Text = "closed-loop clients"
	p.X.Label.Padding = 4
	clients := res.clients()
	var ticks plot.ConstantTicks
	for _, n := range clients {
		ticks = append(ticks, plot.Tick{Value: float64(n), Label: strconv.Itoa(n)})
	}
	p.X.Tick.Marker = ticks
	p.X.Min, p.X.Max = float64(clients[0])/1.3, float64(clients[len(clients)-1])*1.3
	p.Y.Min, p.Y.Max = low/1.25, high*1.25
	p.Y.Tick.Marker = plot.ConstantTicks(decades(p.Y.Min, p.Y.Max))
	grid := plotter.NewGrid()
	grid.Vertical.Color, grid.Horizontal.Color = rgb(0xdddddd), rgb(0xdddddd)
	p.Add(grid)
	return p
}

// decades returns ticks at 1, 2 and 5 times the powers of ten, or at the powers
// only, where there are many.
func decades(low, high float64) []plot.Tick {
	steps := []float64{1, 2, 5}
	if high/low > 2000 {
		steps = steps[:1]
	}
	var ticks []plot.Tick
	for e := math.Floor(math.Log10(low)); e <= math.Log10(high); e++ {
		for _, s := range steps {
			v, err := strconv.ParseFloat(fmt.Sprintf("%ge%g", s, e), 64) // math.Pow10(-1)*5 has an error
			if err == nil && v >= low && v <= high {
				ticks = append(ticks, plot.Tick{Value: v, Label: short(v)})
			}
		}
	}
	return ticks
}

// short writes a number with k for thousands and M for millions.
func short(v float64) string {
	switch {
	case v >= 1e6:
		return strconv.FormatFloat(v/1e6, 'g', -1, 64) + "M"
	case v >= 1e3:
		return strconv.FormatFloat(v/1e3, 'g', -1, 64) + "k"
	}
	return strconv.FormatFloat(v, 'g', -1, 64)
}

// bars are the points of a line with the lowest and the highest round.
type bars []point

func (b bars) Len() int                { return len(b) }
func (b bars) XY(i int) (x, y float64) { return float64(b[i].Clients), b[i].OpsPerSec }
func (b bars) YError(i int) (below, above float64) {
	return b[i].OpsPerSec - b[i].low, b[i].high - b[i].OpsPerSec
}

func throughputChart(res result) (*plot.Plot, error) {
	low, high := math.Inf(1), 0.0
	for _, s := range res.series() {
		for _, q := range s.points {
			low, high = min(low, q.low), max(high, q.high)
		}
	}
	p := newChart(res, "Acknowledged commands per second", low, high)
	for i, s := range res.series() {
		l := lookOf(s.system, i)
		line, marks, err := plotter.NewLinePoints(bars(s.points))
		if err != nil {
			return nil, err
		}
		spans, err := plotter.NewYErrorBars(bars(s.points))
		if err != nil {
			return nil, err
		}
		line.LineStyle, marks.GlyphStyle = l.line(false), l.mark()
		spans.LineStyle, spans.CapWidth = draw.LineStyle{Color: l.color, Width: 0.75}, 5
		p.Add(spans, line, marks)
	}
	return p, nil
}

func latencyChart(res result) (*plot.Plot, error) {
	low, high := math.Inf(1), 0.0
	for _, r := range res.Rows {
		low, high = min(low, r.P50), max(high, r.P99)
	}
	p := newChart(res, "Latency in ms: median (solid) and p99 (dashed)", low, high)
	for i, s := range res.series() {
		l := lookOf(s.system, i)
		var p50, p99 plotter.XYs
		for _, q := range s.points {
			p50 = append(p50, plotter.XY{X: float64(q.Clients), Y: q.P50})
			p99 = append(p99, plotter.XY{X: float64(q.Clients), Y: q.P99})
		}
		middle, marks, err := plotter.NewLinePoints(p50)
		if err != nil {
			return nil, err
		}
		tail, err := plotter.NewLine(p99)
		if err != nil {
			return nil, err
		}
		middle.LineStyle, marks.GlyphStyle, tail.LineStyle = l.line(false), l.mark(), l.line(true)
		p.Add(tail, middle, marks)
	}
	return p, nil
}
